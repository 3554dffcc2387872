"""Train."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.widgets import Static

from edgepeft_tui.actions import bindings
from edgepeft_tui.screens.room import Room


class TrainScreen(Room):
    """Train."""

    AREA = "train"
    BINDINGS: ClassVar[list[BindingType]] = bindings("train")

    def content(self) -> ComposeResult:
        """The screen's own parts."""
        yield Static("")
