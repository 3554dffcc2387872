"""A table of many rows, of which only those on the screen are drawn."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from textwrap import wrap
from typing import ClassVar

import msgspec
from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.strip import Strip

from edgepeft_tui.glyphs import glyphs
from edgepeft_tui.text import visible

_LONGEST = 240
"""Characters of a cell that are looked at: no terminal is wider."""
_SIGNS = 2
"""Cells before the first column: where the cursor is, and what is marked."""
_GAP = 2
_LEAST = 18
"""Cells that the last column is cut to before others leave."""


class Column(msgspec.Struct, frozen=True):
    """One column."""

    title: str
    right: bool = False
    """Whether its cells end below each other, as numbers do."""
    most: int = 40
    """Cells that it takes at the most."""
    leaves: int = 0
    """On a narrow screen the column with the largest number leaves first; 0 stays."""
    rare: bool = False
    """Whether it is there only when a row has something in it."""


NOTHING = "–"
"""A cell that has no value."""


class Line(msgspec.Struct, frozen=True):
    """One row."""

    key: str
    """Unique in its table."""
    cells: tuple[str, ...]
    trouble: bool = False
    """Drawn as something that is wrong; a word in it has to say so too."""
    quiet: bool = False
    """Drawn dimmed."""


class Lines(ScrollView, can_focus=True):
    """Rows with a cursor; space for marks. The first column gives way when there is too little room."""

    DEFAULT_CSS = """
    Lines { height: 1fr; scrollbar-size-vertical: 1; overflow-x: hidden; }
    Lines > .lines--header { color: $text-muted; text-style: bold; }
    Lines > .lines--cursor { background: $primary 35%; text-style: bold; }
    Lines:focus > .lines--cursor { background: $accent 35%; }
    Lines > .lines--trouble { color: $text-error; }
    Lines > .lines--quiet { color: $text-muted; }
    """
    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "lines--header",
        "lines--cursor",
        "lines--trouble",
        "lines--quiet",
    }
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "move(-1)", "Up", id="lines.up", show=False),
        Binding("down", "move(1)", "Down", id="lines.down", show=False),
        Binding("pageup", "page(-1)", "Page up", id="lines.pageup", show=False),
        Binding("pagedown", "page(1)", "Page down", id="lines.pagedown", show=False),
        Binding("home", "move(-1000000000)", "First", id="lines.first", show=False),
        Binding("end", "move(1000000000)", "Last", id="lines.last", show=False),
    ]

    cursor: reactive[int] = reactive(0)

    class Highlighted(Message):
        """Another row has the cursor, or the row has changed."""

        def __init__(self, table: Lines) -> None:
            super().__init__()
            self.table = table

        @property
        def control(self) -> Lines:
            """The table."""
            return self.table

    class Chosen(Message):
        """The row with the cursor was clicked."""

        def __init__(self, table: Lines) -> None:
            super().__init__()
            self.table = table

        @property
        def control(self) -> Lines:
            """The table."""
            return self.table

    def __init__(
        self, columns: Sequence[Column], *, id: str, title: str = "", empty: str = "", help: str = "", classes: str = ""
    ) -> None:
        """Args: `empty` is said where there is no row, `help` by F1."""
        super().__init__(id=id, classes=classes)
        self.help_text = help
        self._columns = tuple(columns)
        self._rows: tuple[Line, ...] = ()
        self._places: dict[str, int] = {}
        self._natural: tuple[int, ...] = ()
        self._marked: frozenset[str] = frozenset()
        self._empty = empty
        self._laid_out: tuple[int, list[tuple[int, int]]] = (-1, [])
        if title:
            self.border_title = title

    # What it holds.

    @property
    def rows(self) -> tuple[Line, ...]:
        """The rows in their order."""
        return self._rows

    @property
    def current(self) -> Line | None:
        """The row with the cursor."""
        return self._rows[self.cursor] if 0 <= self.cursor < len(self._rows) else None

    def show_rows(self, rows: Sequence[Line], empty: str | None = None) -> None:
        """Shows `rows`; the cursor stays on its row where that is still there."""
        kept = self.current
        self._rows = tuple(rows)
        self._places = {row.key: index for index, row in enumerate(self._rows)}
        self._empty = self._empty if empty is None else empty
        self._natural = tuple(
            0
            if column.rare and all(row.cells[at] == NOTHING for row in self._rows)
            else max([cell_len(column.title), *(cell_len(row.cells[at][:_LONGEST]) for row in self._rows)])
            for at, column in enumerate(self._columns)
        )
        self._laid_out = (-1, [])
        self.virtual_size = Size(0, len(self._rows) + 1)
        at = self._places.get(kept.key, self.cursor) if kept else 0
        self.set_reactive(Lines.cursor, max(0, min(at, len(self._rows) - 1)))
        self._keep_in_sight()
        self.refresh()
        if self.current != kept:
            self.post_message(self.Highlighted(self))

    def mark(self, keys: Collection[str]) -> None:
        """Shows which rows are marked."""
        self._marked = frozenset(keys)
        self.refresh()

    def move_to(self, key: str) -> bool:
        """Puts the cursor on a row; returns whether it is there."""
        if key in self._places:
            self.cursor = self._places[key]
        return key in self._places

    # Moving.

    def validate_cursor(self, cursor: int) -> int:
        """Within the rows."""
        return max(0, min(cursor, len(self._rows) - 1))

    def watch_cursor(self) -> None:
        """Scrolls, and tells."""
        self._keep_in_sight()
        self.refresh()
        self.post_message(self.Highlighted(self))

    def action_move(self, by: int) -> None:
        """Moves the cursor by some rows."""
        self.cursor += by

    def action_page(self, by: int) -> None:
        """Moves the cursor by what is seen at once."""
        self.cursor += by * max(1, self.size.height - 2)

    def on_click(self, event: events.Click) -> None:
        """The first click moves the cursor there, another one chooses."""
        at = event.y - self.gutter.top + round(self.scroll_y) - 1
        if event.y - self.gutter.top < 1 or not 0 <= at < len(self._rows):
            return
        if at == self.cursor and self.has_focus:
            self.post_message(self.Chosen(self))
        self.cursor = at

    def on_resize(self) -> None:
        """The cursor stays in sight."""
        self._keep_in_sight()

    def _keep_in_sight(self) -> None:
        height = max(1, self.size.height - 1)
        top = round(self.scroll_y)
        if self.cursor < top:
            self.scroll_to(y=self.cursor, animate=False, force=True)
        elif self.cursor >= top + height:
            self.scroll_to(y=self.cursor - height + 1, animate=False, force=True)

    # Drawing.

    def render_line(self, y: int) -> Strip:
        """The header, or one row."""
        width, base = self._width, self.rich_style
        at = y - 1 + round(self.scroll_y)
        if not self._rows:
            words = wrap(visible(self._empty), max(8, width - 2))
            text = f" {words[y - 1]}" if 1 <= y <= len(words) else ""
            return Strip([Segment(set_cell_size(text, width), self.get_component_rich_style("lines--quiet"))])
        if y == 0:
            style = self.get_component_rich_style("lines--header")
            return Strip([Segment(self._draw("  ", [column.title for column in self._columns]), style)], width)
        if at >= len(self._rows):
            return Strip.blank(width, base)
        row = self._rows[at]
        sign = glyphs().prompt if at == self.cursor else " "
        mark = glyphs().running if row.key in self._marked else " "
        names = ["lines--trouble"] if row.trouble else ["lines--quiet"] if row.quiet else []
        names += ["lines--cursor"] if at == self.cursor else []
        style = self.get_component_rich_style(*names) if names else base
        return Strip([Segment(self._draw(sign + mark, row.cells), style)], width)

    @property
    def _width(self) -> int:
        """Cells of a line: those beside the scrollbar."""
        return self.scrollable_content_region.width

    def _draw(self, signs: str, cells: Sequence[str]) -> str:
        parts = []
        for at, width in self._layout():
            text = visible(cells[at][:_LONGEST])
            long = cell_len(text)
            if long > width:
                text = set_cell_size(text, width - 1) + glyphs().more
            elif self._columns[at].right:
                text = " " * (width - long) + text
            parts.append(set_cell_size(text, width))
        return set_cell_size(f"{signs} {(' ' * _GAP).join(parts)}", self._width)

    def _layout(self) -> list[tuple[int, int]]:
        """Which columns are drawn, and how wide."""
        width = self._width
        if self._laid_out[0] != width:
            self._laid_out = (width, _lay_out(self._columns, self._natural, width - _SIGNS - 1))
        return self._laid_out[1]

    def row_region(self, key: str) -> Region:
        """Where a row is drawn, in the widget's own cells."""
        return Region(0, self._places[key] + 1 - round(self.scroll_y), self._width, 1)


def _lay_out(columns: Sequence[Column], natural: Sequence[int], width: int) -> list[tuple[int, int]]:
    """Columns that find room, with their cells: some leave, then the first gets narrower; the last has what is left."""
    shown = [at for at in range(len(columns)) if natural[at]]
    wanted = [min(column.most, cells) for column, cells in zip(columns, natural, strict=True)]

    def needed(first: int, least: int = 999) -> int:
        others = shown[1:]
        gaps = _GAP * len(others)
        # The last column may be cut short before any leaves.
        return first + gaps + sum(wanted[at] for at in others[:-1]) + sum(min(least, wanted[at]) for at in others[-1:])

    while needed(min(wanted[0], 24), _LEAST) > width:
        leaving = max(shown[1:], key=lambda at: (columns[at].leaves, at), default=0)
        if not columns[leaving].leaves:
            break
        shown.remove(leaving)
    first = max(4, min(wanted[0], width - needed(0, _LEAST)))
    last = shown[-1]
    if last == 0:
        return [(0, min(natural[0], width))]
    cells = max(1, min(natural[last], wanted[last] + width - needed(first)))
    return [(0, first), *((at, wanted[at]) for at in shown[1:-1]), (last, cells)]
