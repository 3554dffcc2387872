"""The top line of every screen: the rooms with their keys, of which one is marked, and the machine."""

from __future__ import annotations

from rich.cells import cell_len
from rich.text import Text
from textual import events
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget

from edgepeft_tui.text import visible

ROOMS = {
    "home": "Home",
    "plan": "Plan",
    "train": "Train",
    "chat": "Chat",
    "adapters": "Adapters",
    "settings": "Settings",
}
"""Screens by their mode, in the order of F2 to F7."""


class TopLine(Widget):
    """One line; a click on a room goes there."""

    DEFAULT_CSS = """
    TopLine { height: 1; background: $panel; color: $foreground; padding: 0 1; }
    """
    HELP = "The rooms of this program; F2 to F7 go there, and so does a click."

    device: reactive[str] = reactive("")

    class Chosen(Message):
        """A room was clicked."""

        def __init__(self, room: str) -> None:
            super().__init__()
            self.room = room

    def __init__(self, room: str) -> None:
        super().__init__(id="top")
        self._room = room

    def render(self) -> Text:
        """The rooms, and the machine where there is space."""
        line = Text(no_wrap=True, overflow="crop")
        for name, start, end in self._places():
            line.append(" " * (start - cell_len(line.plain)))
            label = self._label(name)
            line.append(label, style="reverse bold" if name == self._room else "")
            assert cell_len(line.plain) == end
        room = self.size.width - cell_len(line.plain) - 2
        device = visible(self.device)
        for text in (f"{device}  offline", device, device.partition(" · ")[0]):
            if self.device and cell_len(text) <= room:
                line.append(" " * (self.size.width - cell_len(line.plain) - cell_len(text)))
                line.append(text, style="dim")
                break
        return line

    def on_click(self, event: events.Click) -> None:
        """Goes to the room under the mouse."""
        for name, start, end in self._places():
            if start <= event.x - self.gutter.left < end:
                self.post_message(self.Chosen(name))

    def _label(self, name: str) -> str:
        number = list(ROOMS).index(name) + 2
        if self.size.width >= 66:
            return f" F{number} {ROOMS[name]} "
        return f" {number} {ROOMS[name][:8] if name == self._room else ROOMS[name][:5]} "

    def _places(self) -> list[tuple[str, int, int]]:
        """Each room with its first cell, and the one behind its last."""
        found, at = [], 0
        for name in ROOMS:
            width = cell_len(self._label(name))
            found.append((name, at, at + width))
            at += width
        return found
