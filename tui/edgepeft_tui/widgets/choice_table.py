"""The table of every choice: value, origin and reason, one highlighted row of which can be edited in place."""

from __future__ import annotations

from rich.cells import cell_len, set_cell_size
from rich.text import Text
from textual import events
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from edgepeft_tui.choice_rows import ChoiceRow
from edgepeft_tui.glyphs import glyphs
from edgepeft_tui.text import visible

_WHAT, _VALUE, _FROM = 18, 16, 6


class ChoiceTable(OptionList):
    """Rows that keep their highlight while the plan changes under it."""

    DEFAULT_CSS = """
    ChoiceTable { text-wrap: nowrap; text-overflow: ellipsis; }
    """

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id, markup=False)
        self._rows: tuple[ChoiceRow, ...] = ()
        self._pending: frozenset[str] = frozenset()

    def show_rows(self, rows: tuple[ChoiceRow, ...], pending: frozenset[str] = frozenset()) -> None:
        """Shows rows; `pending` names those that were changed and whose plan is not there yet."""
        if rows == self._rows and pending == self._pending:
            return
        kept, self._rows, self._pending = self.row, rows, pending
        self._fill(kept.what if kept is not None else None)

    @property
    def row(self) -> ChoiceRow | None:
        """The highlighted one."""
        if self.highlighted is None or self.highlighted >= len(self._rows):
            return None
        return self._rows[self.highlighted]

    def go_to(self, what: str) -> None:
        """Highlights a row by its name."""
        names = [row.what for row in self._rows]
        if what in names:
            self.highlighted = names.index(what)

    def on_resize(self, event: events.Resize) -> None:
        """Draws the columns to the new width."""
        self._fill(self.row.what if self.row is not None else None)

    def _fill(self, highlighted: str | None) -> None:
        top = self.scroll_offset.y
        names = [row.what for row in self._rows]
        self.clear_options()
        self.add_options([Option(self._line(row)) for row in self._rows])
        if names:
            self.highlighted = names.index(highlighted) if highlighted in names else 0
        self.scroll_to(y=top, animate=False)

    def _line(self, row: ChoiceRow) -> Text:
        wide = self.size.width >= 100
        value_width = _VALUE + (8 if wide else 0)
        line = Text(no_wrap=True, overflow="ellipsis")
        mine = row.origin == "user"
        line.append(f"{row.what:<{_WHAT}} ", style="bold" if mine else "")
        value = visible(row.value)
        if cell_len(value) > value_width:
            value = set_cell_size(value, value_width - 1) + glyphs().more
        line.append(set_cell_size(value, value_width), style="bold" if mine else "" if row.origin else "dim")
        waits = row.what in self._pending
        origin = glyphs().more if waits else row.origin
        line.append(f" {origin:<{_FROM}} ", style="yellow" if mine or waits else "dim")
        line.append(visible(row.why), style="dim")
        return line
