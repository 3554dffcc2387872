"""The runner-ups of a plan, each of which can be taken."""

from __future__ import annotations

from rich.text import Text
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from edgepeft_tui.plans import OtherRow
from edgepeft_tui.text import visible


def other_line(row: OtherRow) -> Text:
    """A runner-up on one line: what, cost, time, why."""
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(f"{visible(row.what):<26}", style="" if row.fits else "dim")
    line.append(f" {row.cost:>22}", style="" if row.fits else "dim")
    line.append(f"  {row.time:>8}" if row.time else "", style="dim")
    line.append(f"  {visible(row.why)}", style="dim")
    return line


class OthersList(OptionList):
    """Shows what else there was."""

    def __init__(self, *, id: str, classes: str) -> None:
        super().__init__(id=id, classes=classes, markup=False)
        self._rows: tuple[OtherRow, ...] = ()

    def show_rows(self, rows: tuple[OtherRow, ...], *, working: bool) -> None:
        """Shows them; `working` says that they are still being looked for."""
        if rows == self._rows and self.option_count:
            return
        self._rows = rows
        self.clear_options()
        if not rows:
            word = "comparing with other plans" if working else "nothing else comes near"
            self.add_option(Option(Text(word, style="dim"), disabled=True))
        self.add_options([Option(other_line(row)) for row in rows])

    @property
    def row(self) -> OtherRow | None:
        """The highlighted one."""
        at = self.highlighted
        return self._rows[at] if at is not None and at < len(self._rows) else None
