"""Adapters: what the library holds, and what can be done with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.widgets import Static

from edgepeft.errors import EdgepeftError
from edgepeft_tui.actions import bindings
from edgepeft_tui.adapters import Compared, compare, lost_with
from edgepeft_tui.screens.adapter_list import ListScreen
from edgepeft_tui.screens.dialogs import Choice, Pick, Reading
from edgepeft_tui.widgets.adapter_tables import names_table, version_line, versions_table
from edgepeft_tui.widgets.facts import FactsPane, draw_compared
from edgepeft_tui.widgets.filter_line import FilterLine
from edgepeft_tui.widgets.lines import Lines

_MOST_CHATS = 4


@dataclass
class ComparedRead(Message):
    """Two adapters were compared."""

    left: str
    right: str
    rows: tuple[Compared, ...]


class AdaptersScreen(ListScreen):
    """Lists adapters and their versions; every action is on the row with the cursor, or on the marked ones."""

    AREA = "adapters"
    CSS_PATH = "adapters.tcss"
    BINDINGS: ClassVar[list[BindingType]] = bindings("adapters")
    HELP = (
        "Adapters shows the library: the newest version of each name above, all versions of the highlighted one below. "
        "Space marks; what takes several (compose, average, compare, chat) takes the marked ones. Nothing here changes "
        "a version: combining, importing and rolling back make new ones, and only delete removes any."
    )

    def content(self) -> ComposeResult:
        """Two tables, the card beside them on a wide screen, the work below."""
        with Horizontal(id="keep"):
            with Vertical(id="lists"):
                yield FilterLine("name, base or method", id="filter")
                yield names_table()
                yield versions_table()
            with FactsPane(id="card", classes="frame"):
                yield Static("", id="facts", markup=False)
        yield self.work_pane()

    # Actions.

    def action_card(self) -> None:
        """The card: in its pane on a wide screen, else as a dialog."""
        reference = self._reference()
        if self.has_class("-wide"):
            self.query_one("#card").focus()
        elif self._facts is not None and self._facts.reference == reference:
            self.open_card(self._facts)
        elif reference is not None:
            # It is being read, and opens when it is there.
            self._opening = reference

    def action_leave_card(self) -> None:
        """Goes back from the card's pane to the list."""
        self.query_one("#adapters").focus()

    @on(Lines.Chosen)
    def _row_clicked(self) -> None:
        self.action_card()

    def action_mark(self) -> None:
        """Marks the version with the cursor, or no longer."""
        reference = self._reference()
        if reference is None:
            return
        if reference in self._marked:
            self._marked.remove(reference)
        else:
            self._marked.append(reference)
        self._show_marks()
        focused = self.focused
        if isinstance(focused, Lines):
            focused.action_move(1)

    def action_versions(self) -> None:
        """Moves to the versions."""
        self.query_one("#versions").focus()

    async def action_chat(self) -> None:
        """Chats with one, or compares the marked ones in a chat."""
        meant = self._meant()
        if len(meant) == 1:
            await self._app.go("chat", adapter=meant[0])
        elif 2 <= len(meant) <= _MOST_CHATS:
            await self._app.go("chat", adapters=meant)
        elif meant:
            self._app.tell(
                f"A chat compares at most {_MOST_CHATS} adapters; {len(meant)} are marked", severity="warning"
            )

    def action_compare(self) -> None:
        """Two marked ones side by side."""
        if (pair := self._several("Comparing", 2)) is not None:
            self._compare(*pair)

    @work(thread=True, exclusive=True, group="compare", exit_on_error=False)
    def _compare(self, left: str, right: str) -> None:
        try:
            self.post_message(ComparedRead(left, right, compare(left, right)))
        except (EdgepeftError, OSError) as error:
            self.app.call_from_thread(self._app.tell_error, error)

    @on(ComparedRead)
    def _compared(self, message: ComparedRead) -> None:
        drawn = draw_compared(message.left, message.right, message.rows)
        self.app.push_screen(Reading(drawn, title="What differs"))

    def action_compose(self) -> None:
        """Adds the marked ones up."""
        if (references := self._several("Composing")) is not None:
            self.ask_compose(references)

    def action_average(self) -> None:
        """Averages the marked ones."""
        if (references := self._several("Averaging")) is not None:
            self.ask_average(references)

    def action_merge(self) -> None:
        """Writes a model with the adapter in its weights."""
        if (reference := self._reference()) is not None:
            self.ask_merge(reference)

    def action_export(self) -> None:
        """Writes the adapter alone."""
        if (reference := self._reference()) is not None:
            self.ask_export(reference)

    def action_roll_back(self) -> None:
        """Asks which version the name shall mean."""
        line = self.query_one("#adapters", Lines).current
        older = list(self._versions.values())[1:]
        if line is None:
            return
        if not older or older[0].name != line.key:
            self._app.tell(f"{line.key} has one version only: there is nothing to go back to", severity="warning")
            return
        rows = [(str(row.version), "  ".join(version_line(row).cells)) for row in older if not row.trouble]
        question = f"Which version shall {line.key} mean? It becomes the newest once more; nothing is lost."

        def go_back(version: str | None) -> None:
            if version is not None:
                self.do_roll_back(line.key, int(version))

        self.app.push_screen(Pick(question, rows, title="Roll back"), go_back)

    def action_remove(self) -> None:
        """Asks, naming what is lost, and deletes."""
        line, versions = self.query_one("#adapters", Lines).current, self.query_one("#versions", Lines)
        if line is None:
            return
        one = versions.current.key if versions.has_focus and versions.current is not None else None
        try:
            lost = lost_with(one or line.key)
        except (EdgepeftError, OSError) as error:
            self._app.tell_error(error)
            return

        def delete(answer: str | None) -> None:
            if answer == "delete":
                self.do_remove(line.key, int(one.rpartition("@v")[2]) if one else None)

        answers = (("keep", "Keep"), ("delete", "Delete"))
        self.app.push_screen(Choice(lost, answers, title="Delete", danger="delete"), delete)
