"""What is known of an adapter, drawn as names beside texts; texts from outside are never markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll

from edgepeft_tui.adapters import Compared, Facts
from edgepeft_tui.text import visible


class FactsPane(VerticalScroll):
    """Scrolls what is known of an adapter."""

    HELP = "All that is known of the highlighted version: base, recipe, data, results, lineage, and what it changes."
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "screen.leave_card", "To the list", id="facts.leave", tooltip="Go back to the list"),
    ]


def draw_facts(facts: Facts) -> RenderableType:
    """The card, the parameters that it changes, and what happened to it."""
    parts: list[RenderableType] = []
    if facts.trouble:
        parts += [Text(f"damaged: {visible(facts.trouble)}", style="bold red"), Text()]
    parts.append(_beside(facts.lines))
    if facts.changed:
        parts += [Text(), Text("It adds or changes", style="bold"), _beside(facts.changed)]
    if facts.audit:
        parts += [Text(), Text("What happened", style="bold"), *(Text(visible(line)) for line in facts.audit)]
    return Group(*parts)


def draw_compared(left: str, right: str, rows: Sequence[Compared]) -> RenderableType:
    """Two adapters side by side: what differs, then the names of what does not."""
    differing, same = [row for row in rows if row.differs], [row.what for row in rows if not row.differs]
    grid = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    grid.add_column("", style="dim", no_wrap=True, max_width=18)
    grid.add_column(Text(visible(left)), ratio=1, overflow="fold")
    grid.add_column(Text(visible(right)), ratio=1, overflow="fold")
    for row in differing:
        grid.add_row(*(Text(visible(text)) for text in (row.what, row.left, row.right)))
    alike = ", ".join(same) or "nothing"
    return Group(grid, Text(), Text(f"The same in both: {visible(alike)}", style="dim"))


def _beside(lines: Iterable[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="dim", max_width=22, overflow="fold")
    grid.add_column(overflow="fold")
    for what, text in lines:
        grid.add_row(Text(visible(what)), Text(visible(text)))
    return grid
