"""Plan."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.widgets import Static

from edgepeft_tui.actions import bindings
from edgepeft_tui.screens.room import Room


class PlanScreen(Room):
    """Plan."""

    AREA = "plan"
    BINDINGS: ClassVar[list[BindingType]] = bindings("plan")

    def content(self) -> ComposeResult:
        """The screen's own parts."""
        yield Static("")
