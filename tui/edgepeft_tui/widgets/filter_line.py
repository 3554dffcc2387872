"""A line that filters a list while it is typed; it is there only while it is used."""

from __future__ import annotations

from typing import ClassVar

from textual import on
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import Input


class FilterLine(Input):
    """Enter goes back to the list and keeps the filter, escape takes it away."""

    DEFAULT_CSS = """
    FilterLine { display: none; background: $panel; }
    FilterLine.-open { display: block; }
    """
    HELP = "Shows only the rows that hold every word. Enter goes to them, escape shows all again."
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", "Show all", id="filter.leave", tooltip="Show all rows again"),
        Binding("down", "submit", "To the list", id="filter.down", show=False),
    ]

    class Left(Message):
        """The list shall have the focus."""

    def __init__(self, what: str, *, id: str) -> None:
        super().__init__(placeholder=f"filter by {what}", id=id, compact=True)

    def open(self) -> None:
        """Shows it with the focus in it."""
        self.add_class("-open")
        self.focus()

    def action_leave(self) -> None:
        """Takes the filter away."""
        self.value = ""
        self.remove_class("-open")
        self.post_message(self.Left())

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        event.stop()
        if not self.value:
            self.remove_class("-open")
        self.post_message(self.Left())
