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

    def __init__(self, title: str, empty: str, *, id: str) -> None:
        super().__init__(id=id, markup=False)
        self.border_title = Text(title).plain
        self._empty = empty
        self._rows: tuple[Row, ...] | None = None

    def show_rows(self, rows: tuple[Row, ...]) -> None:
        """Shows `rows`; does nothing when they are the same as before."""
        if rows == self._rows:
            return
        kept = self.selected_row
        self._rows = rows
        self.clear_options()
        if not rows:
            self.add_option(Option(Text(self._empty, style="dim"), disabled=True))
            return
        name_width = min(28, max(len(row.key) for row in rows))
        for row in rows:
            sign, style = sign_of(row.mark)
            line = Text(no_wrap=True, overflow="ellipsis")
            line.append(f"{sign} ", style=style)
            line.append(f"{visible(row.key)[:name_width]:<{name_width}}", style="bold")
            line.append(f"  {visible(row.text)}")
            self.add_option(Option(line))
        keys = [row.key for row in rows]
        self.highlighted = keys.index(kept.key) if kept is not None and kept.key in keys else 0

    @property
    def selected_row(self) -> Row | None:
        """The highlighted row."""
        if not self._rows or self.highlighted is None or self.highlighted >= len(self._rows):
            return None
        return self._rows[self.highlighted]
