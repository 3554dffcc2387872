"""A list of runs, adapters or models in a titled frame, with a word for what to do when it is empty."""

from __future__ import annotations

from rich.text import Text
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from edgepeft_tui.glyphs import glyphs
from edgepeft_tui.readings import Mark, Row
from edgepeft_tui.text import visible


def sign_of(mark: Mark) -> tuple[str, str]:
    """The sign of a row, and its style; the sign alone says enough."""
    signs = glyphs()
    return {
        "running": (signs.running, "green"),
        "done": (signs.done, "green"),
        "trouble": (signs.trouble, "red"),
        "plain": (" ", ""),
    }[mark]


class Shelf(OptionList):
    """Rows that keep their place and highlight while they are refreshed."""

    def __init__(self, title: str, empty: str, *, id: str, help: str = "") -> None:
        super().__init__(id=id, markup=False)
        self.border_title = Text(title).plain
        self.help_text = help
        self._empty = empty
        self._rows: tuple[Row, ...] | None = None
        self._name_width = 0

    def show_rows(self, rows: tuple[Row, ...]) -> None:
        """Shows `rows`; does nothing when they are the same as before."""
        if rows == self._rows:
            return
        before, kept = self._rows, self.selected_row
        self._rows = rows
        name_width = min(28, max((len(row.key) for row in rows), default=0))
        if before and [row.key for row in before] == [row.key for row in rows]:
            # Of hundreds of rows one or two change at a time.
            for index, (old, new) in enumerate(zip(before, rows, strict=True)):
                if old != new:
                    self.replace_option_prompt_at_index(index, _line(new, name_width))
            return
        if before and before == rows[: len(before)] and name_width == self._name_width:
            self.add_options(Option(_line(row, name_width)) for row in rows[len(before) :])
            return
        self._name_width = name_width
        self.clear_options()
        if not rows:
            self.add_option(Option(Text(self._empty, style="dim"), disabled=True))
            return
        self.add_options(Option(_line(row, name_width)) for row in rows)
        keys = [row.key for row in rows]
        self.highlighted = keys.index(kept.key) if kept is not None and kept.key in keys else 0

    def select(self, key: str) -> bool:
        """Highlights the row of that name; False where there is none."""
        for index, row in enumerate(self._rows or ()):
            if row.key == key:
                self.highlighted = index
                return True
        return False

    @property
    def selected_row(self) -> Row | None:
        """The highlighted row."""
        if not self._rows or self.highlighted is None or self.highlighted >= len(self._rows):
            return None
        return self._rows[self.highlighted]


def _line(row: Row, name_width: int) -> Text:
    sign, style = sign_of(row.mark)
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(f"{sign} ", style=style)
    line.append(f"{visible(row.key)[:name_width]:<{name_width}}", style="bold")
    line.append(f"  {visible(row.text)}")
    return line
