"""The half of the Adapters screen that reads: the library in parts, and the row with the cursor when it rests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from textual import on, work
from textual.message import Message
from textual.timer import Timer
from textual.widgets import Input, Static

from edgepeft.errors import EdgepeftError
from edgepeft_tui.adapters import AdapterRow, Facts, read_facts, read_library, read_versions
from edgepeft_tui.messages import ShelvesRead
from edgepeft_tui.readings import Row
from edgepeft_tui.screens.adapter_work import WorkScreen
from edgepeft_tui.screens.dialogs import Reading
from edgepeft_tui.text import visible
from edgepeft_tui.widgets.adapter_tables import name_line, searched, version_line
from edgepeft_tui.widgets.facts import draw_facts
from edgepeft_tui.widgets.filter_line import FilterLine
from edgepeft_tui.widgets.lines import Lines

_PAUSE_SECONDS = 0.06
"""After the last move of the cursor, before its row is read."""
_EMPTY = "No adapter yet. F3 plans a run that trains one; i imports a folder that PEFT saved."


@dataclass
class LibraryRead(Message):
    """A part of the library was read."""

    reading: int
    """Which reading it belongs to."""
    rows: tuple[AdapterRow, ...]
    done: bool


@dataclass
class LibraryUnread(Message):
    """The library could not be read."""

    error: Exception


@dataclass
class NameRead(Message):
    """The row with the cursor was read."""

    facts: Facts
    versions: tuple[AdapterRow, ...]

    def can_replace(self, message: Message) -> bool:
        """The cursor is elsewhere by now."""
        return isinstance(message, NameRead)


class ListScreen(WorkScreen):
    """Has the tables `#adapters` and `#versions`, the line `#filter` and the card `#facts`, and keeps them true."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: list[AdapterRow] = []
        self._versions: dict[str, AdapterRow] = {}
        self._marked: list[str] = []
        self._reading = self._shown_reading = 0
        self._coming: list[AdapterRow] = []
        self._seen: tuple[Row, ...] | None = None
        self._wanted = ""
        self._pause: Timer | None = None
        self._facts: Facts | None = None
        self._opening = ""

    def on_mount(self) -> None:
        """Reads, and puts the cursor into the list."""
        self.query_one("#card").border_title = "Card"
        self.query_one("#adapters").focus()
        self.read_again()

    def show(self, adapter: str = "", **what: Any) -> None:
        """Moves to an adapter."""
        self._wanted = adapter.partition("@")[0]
        self._move_to_wanted()

    # Reading.

    @on(ShelvesRead)
    def _shelves_read(self, message: ShelvesRead) -> None:
        if self._seen is not None and message.shelves.adapters != self._seen:
            self.read_again()
        self._seen = message.shelves.adapters

    def read_again(self) -> None:
        """Reads the library anew; what is shown stays until that is done."""
        self._reading += 1
        self._read(self._reading)

    @work(thread=True, exclusive=True, group="library", exit_on_error=False)
    def _read(self, reading: int) -> None:
        try:
            for rows, done in read_library():
                self.post_message(LibraryRead(reading, rows, done))
                if reading != self._reading:
                    return
        except (EdgepeftError, OSError) as error:
            self.post_message(LibraryUnread(error))

    @on(LibraryUnread)
    def _library_unread(self, message: LibraryUnread) -> None:
        self._rows = []
        self.query_one("#adapters", Lines).show_rows((), f"The library cannot be read: {message.error}")

    @on(LibraryRead)
    def _library_read(self, message: LibraryRead) -> None:
        if message.reading != self._reading:
            return
        if message.reading != self._shown_reading:
            self._shown_reading, self._coming = message.reading, []
        self._coming += message.rows
        # The first reading fills an empty table as it comes; a later one is shown when it is whole.
        if message.done or len(self._coming) > len(self._rows):
            self._rows = list(self._coming)
            self._show_names(message.done)
        if message.done:
            self._forget_gone_marks()

    def _show_names(self, done: bool = True) -> None:
        table = self.query_one("#adapters", Lines)
        words = self.query_one("#filter", FilterLine).value.lower().split()
        rows = [row for row in self._rows if all(word in searched(row) for word in words)]
        table.show_rows([name_line(row) for row in rows], "Nothing matches the filter" if self._rows else _EMPTY)
        count = f"{len(rows)} of {len(self._rows)}" if words else f"{len(self._rows)}"
        broken = sum(bool(row.trouble) for row in self._rows)
        title = f"Adapters · {count}" + (f" · {broken} damaged" if broken else "") + ("" if done else " …")
        table.border_title = title
        self._move_to_wanted()
        self._look_soon()

    def _move_to_wanted(self) -> None:
        if self._wanted and self.query_one("#adapters", Lines).move_to(self._wanted):
            self._wanted = ""

    @on(Lines.Highlighted)
    def _highlighted(self) -> None:
        if self._opening != self._reference():
            self._opening = ""
        self._look_soon()

    def _look_soon(self) -> None:
        if self._pause is not None:
            self._pause.stop()
        self._pause = self.set_timer(_PAUSE_SECONDS, self._look)

    def _look(self) -> None:
        line = self.query_one("#adapters", Lines).current
        if line is None:
            self._show_facts(None)
            self.query_one("#versions", Lines).show_rows(())
            return
        self._read_name(line.key, self._reference() or line.key)

    @work(thread=True, exclusive=True, group="facts", exit_on_error=False)
    def _read_name(self, name: str, reference: str) -> None:
        self.post_message(NameRead(read_facts(reference), read_versions(name)))

    @on(NameRead)
    def _name_read(self, message: NameRead) -> None:
        line = self.query_one("#adapters", Lines).current
        name = message.facts.reference.partition("@")[0]
        if line is None or line.key != name:
            return
        self._versions = {row.reference: row for row in message.versions}
        versions = self.query_one("#versions", Lines)
        versions.show_rows([version_line(row) for row in message.versions])
        versions.border_title = f"Versions of {visible(name)[:40]} (v)".replace("[", "\\[")
        self._show_facts(message.facts)
        if self._opening == message.facts.reference:
            self.open_card(message.facts)

    def open_card(self, facts: Facts) -> None:
        """Shows a card as a dialog."""
        self._opening = ""
        self.app.push_screen(Reading(draw_facts(facts), title=facts.reference))

    def _show_facts(self, facts: Facts | None) -> None:
        self._facts = facts
        self.query_one("#facts", Static).update("" if facts is None else draw_facts(facts))

    # What is meant.

    def _reference(self) -> str | None:
        """The version with the cursor, where the versions have the focus; else the newest of the name."""
        line, version = self.query_one("#adapters", Lines).current, self.query_one("#versions", Lines)
        if version.has_focus and version.current is not None:
            return version.current.key
        row = next((row for row in self._rows if line is not None and row.name == line.key), None)
        return row.reference if row is not None else None

    def _meant(self) -> list[str]:
        """The marked ones, else the one with the cursor."""
        here = self._reference()
        return list(self._marked) or ([here] if here else [])

    def _several(self, what: str, most: int = 99) -> list[str] | None:
        if 2 <= len(self._marked) <= most:
            return list(self._marked)
        wanted = "two" if most == 2 else "two or more"
        self._app.tell(f"{what} takes {wanted} adapters: mark them with space", severity="warning")
        return None

    def _forget_gone_marks(self) -> None:
        names = {row.name for row in self._rows}
        self._marked = [reference for reference in self._marked if reference.partition("@")[0] in names]
        self._show_marks()

    def _show_marks(self) -> None:
        newest = {row.reference: row.name for row in self._rows}
        self.query_one("#adapters", Lines).mark({newest[one] for one in self._marked if one in newest})
        self.query_one("#versions", Lines).mark(self._marked)
        marked = f"{len(self._marked)} marked: {', '.join(map(visible, self._marked))}" if self._marked else ""
        self.query_one("#adapters", Lines).border_subtitle = marked[:200].replace("[", "\\[")

    # The filter.

    def action_filter(self) -> None:
        """Opens the filter."""
        self.query_one("#filter", FilterLine).open()

    @on(Input.Changed, "#filter")
    def _filter_changed(self) -> None:
        self._show_names()

    @on(FilterLine.Left)
    def _filter_left(self) -> None:
        self.query_one("#adapters").focus()
