"""Jump mode: a letter on every part that can have the focus; pressing it goes there."""

from __future__ import annotations

from typing import Any, ClassVar

from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.geometry import Offset
from textual.screen import ModalScreen, Screen
from textual.widget import Widget
from textual.widgets import Static

_LETTERS = "asdfghjklqwertyuiopzxcvbnm"


class JumpScreen(ModalScreen[Widget | None]):
    """Lies over a screen and answers with the part that was chosen."""

    CSS = """
    JumpScreen { background: $background 30%; }
    JumpScreen .letter {
        width: 3; height: 1; position: absolute; content-align: center middle;
        background: $accent; color: $background; text-style: bold;
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss_empty", "Cancel", id="jump.cancel", tooltip="Stay where the focus is")
    ]

    def __init__(self, screen: Screen[Any]) -> None:
        super().__init__()
        chain = [widget for widget in screen.focus_chain if widget.region.area]
        self._targets = dict(zip(_LETTERS, chain, strict=False))

    def compose(self) -> ComposeResult:
        """The letters at their parts' upper left corners."""
        for letter, widget in self._targets.items():
            label = Static(Text(letter), classes="letter")
            label.styles.offset = Offset(widget.region.x + 1, widget.region.y)
            yield label

    def on_key(self, event: events.Key) -> None:
        """A letter goes to its part; any other key stays."""
        if event.key == "escape":
            return
        event.stop()
        self.dismiss(self._targets.get(event.key))

    def action_dismiss_empty(self) -> None:
        """Stays where the focus is."""
        self.dismiss(None)
