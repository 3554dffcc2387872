"""The stacked memory bar, and the one place for the colour, the sign and the order of the ledger's categories."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import msgspec
from rich.text import Text
from textual.reactive import reactive
from textual.widget import Widget

from edgepeft.memory.breakdown import Category
from edgepeft.units import GIB, MIB
from edgepeft_tui.glyphs import glyphs

CATEGORIES: tuple[Category, ...] = get_args(Category)
"""In the order in which every screen stacks them: what stays for the whole run comes first."""
_COLORS: dict[Category, str] = {
    "frozen weights": "#5f87af",
    "quantization constants": "#47698c",
    "embeddings and head": "#7fa8a8",
    "adapter weights": "#d9a05b",
    "gradients": "#c4803d",
    "optimizer state": "#b0593c",
    "saved activations": "#7fae70",
    "recomputed layer": "#5f9152",
    "logits and loss": "#a585be",
    "workspace": "#836aa3",
    "KV cache": "#c98aa6",
    "device context": "#858b94",
    "allocator slack": "#666d76",
}
_SHORT: dict[Category, str] = {
    "frozen weights": "base",
    "quantization constants": "constants",
    "embeddings and head": "embeddings",
    "adapter weights": "adapter",
    "gradients": "gradients",
    "optimizer state": "optimizer",
    "saved activations": "activations",
    "recomputed layer": "layer",
    "logits and loss": "logits",
    "workspace": "workspace",
    "KV cache": "KV cache",
    "device context": "device",
    "allocator slack": "slack",
}
_LEAST_SHARE = 0.004
"""Categories below this share of the total are not named under a bar: they would all read 0.0."""


class Ledger(msgspec.Struct, frozen=True):
    """What a bar shows."""

    bytes_by_category: dict[Category, int]
    budget_bytes: int | None = None
    uncertainty: float = 0.0
    """Share of the total by which the measured value may lie above it."""

    @property
    def total_bytes(self) -> int:
        """All categories."""
        return sum(self.bytes_by_category.values())

    @property
    def unsure_bytes(self) -> int:
        """What may come on top."""
        return round(self.total_bytes * self.uncertainty)


def category_style(category: Category) -> str:
    """A category's colour, the same on every screen and in every theme."""
    return _COLORS[category]


def category_sign(category: Category) -> str:
    """A category's sign, one cell wide, so that its colour is not the only signal."""
    return glyphs().shades[CATEGORIES.index(category)]


def category_name(category: Category) -> str:
    """A category in a word."""
    return _SHORT[category]


def unit_of(size_bytes: int) -> tuple[int, str]:
    """The unit in which figures up to this are shown side by side, and its name."""
    return (GIB, "GiB") if size_bytes >= GIB // 2 else (MIB, "MiB")


def format_in(size_bytes: float, unit: int) -> str:
    """A size in a unit of `unit_of`, with as many decimals as tell sizes of a few apart."""
    value = size_bytes / unit
    return f"{value:.2f}" if abs(value) < 9.995 and unit == GIB else f"{value:.1f}"


def stacked_bar(ledger: Ledger, width: int) -> Text:
    """A bar of exactly `width` cells: categories, what may come on top, free space, and the budget's line."""
    budget, total = ledger.budget_bytes or 0, ledger.total_bytes
    scale = max(budget * 1.02, total + ledger.unsure_bytes, 1)
    cells: list[tuple[str, str]] = []
    reached = 0
    for category in CATEGORIES:
        reached += ledger.bytes_by_category.get(category, 0)
        end = min(width, round(width * reached / scale))
        cells += [(category_sign(category), category_style(category))] * (end - len(cells))
    end = min(width, round(width * (total + ledger.unsure_bytes) / scale))
    if ledger.unsure_bytes and end == len(cells) < width:
        end += 1
    cells += [("+", "yellow")] * (end - len(cells))
    cells += [(" ", "")] * (width - len(cells))
    if budget:
        at = min(width - 1, int(width * budget / scale))
        cells[at] = (glyphs().line, "bold red" if total > budget else "bold")
    bar = Text(no_wrap=True, overflow="crop")
    for sign, style in cells:
        bar.append(sign, style=style)
    return bar


def legend(
    bytes_by_category: Mapping[Category, int], width: int, lines: int = 2, budget_bytes: int | None = None
) -> Text:
    """The categories with sign, name and size, on at most `lines` lines of `width` cells, the largest kept.

    Sizes are in the unit in which the total and the budget are told beside them.
    """
    total = sum(bytes_by_category.values())
    unit, _ = unit_of(max(total, budget_bytes or 0))
    entries = []
    for category in CATEGORIES:
        size = bytes_by_category.get(category, 0)
        if size and size >= _LEAST_SHARE * total:
            entries.append((category, f" {category_name(category)} {format_in(size, unit)}", size))
    while entries:
        text = _flow(entries, width)
        if text.plain.count("\n") < lines:
            return text
        entries.remove(min(entries, key=lambda entry: entry[2]))
    return Text()


def _flow(entries: list[tuple[Category, str, int]], width: int) -> Text:
    text, column = Text(no_wrap=True, overflow="crop"), 0
    for category, label, _ in entries:
        size = 1 + len(label)
        if column and column + 2 + size > width:
            text.append("\n")
            column = 0
        elif column:
            text.append("  ")
            column += 2
        text.append(category_sign(category), style=category_style(category))
        text.append(label)
        column += size
    return text


class LedgerBar(Widget):
    """A stacked bar above its legend."""

    DEFAULT_CSS = """
    LedgerBar { height: auto; width: 1fr; }
    """
    ledger: reactive[Ledger | None] = reactive(None, layout=True)
    legend_lines: reactive[int] = reactive(2, layout=True)

    def watch_ledger(self, ledger: Ledger | None) -> None:
        """Takes no room where there is nothing to show."""
        self.display = ledger is not None

    def render(self) -> Text:
        """Bar and legend, drawn to the widget's width."""
        if self.ledger is None:
            return Text("")
        width = max(8, self.size.width)
        return Text("\n").join([stacked_bar(self.ledger, width), self._legend(width)])

    def get_content_height(self, container: object, viewport: object, width: int) -> int:
        """The bar's line and the legend's."""
        return 1 if self.ledger is None else 2 + self._legend(max(8, width)).plain.count("\n")

    def _legend(self, width: int) -> Text:
        if self.ledger is None:
            return Text()
        return legend(self.ledger.bytes_by_category, width, self.legend_lines, self.ledger.budget_bytes)
