"""The runner-ups of a plan, each of which can be taken."""

from __future__ import annotations

from rich.text import Text
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from edgepeft_tui.plans import OtherRow
from edgepeft_tui.text import visible


def other_lines(rows: tuple[OtherRow, ...]) -> list[Text]:
    """Runner-ups, each on one line: what, cost, time, why."""
    what = max((len(row.what) for row in rows), default=0)
    cost = max((len(row.cost) for row in rows), default=0)
    clock = max((len(row.time) for row in rows), default=0)
    lines = []
    for row in rows:
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append(f"{visible(row.what):<{what}}  {row.cost:>{cost}}", style="" if row.fits else "dim")
        line.append(f"  {row.time:>{clock}}" if clock else "", style="dim")
        line.append(f"  {visible(row.why)}", style="dim")
        lines.append(line)
    return lines


class OthersList(OptionList):
    """Shows what else there was."""

    def __init__(self, *, id: str, classes: str) -> None:
        super().__init__(id=id, classes=classes, markup=False)
        self._rows: tuple[OtherRow, ...] = ()

    def show_rows(self, rows: tuple[OtherRow, ...], empty: str) -> None:
        """Shows them; `empty` is said where there are none."""
        if rows and rows == self._rows:
            return
        self._rows = rows
        self.clear_options()
        if not rows:
            self.add_option(Option(Text(empty, style="dim"), disabled=True))
        self.add_options([Option(line) for line in other_lines(rows)])

    @property
    def row(self) -> OtherRow | None:
        """The highlighted one."""
        at = self.highlighted
        return self._rows[at] if at is not None and at < len(self._rows) else None
