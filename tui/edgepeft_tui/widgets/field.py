"""A value with its label on one line, which enter, space or a click lets one change."""

from __future__ import annotations

from typing import ClassVar

from rich.cells import cell_len, set_cell_size
from rich.text import Text
from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget

from edgepeft_tui.glyphs import glyphs
from edgepeft_tui.text import visible


class Field(Widget, can_focus=True):
    """One line; posts `Pressed`."""

    DEFAULT_CSS = """
    Field { height: 1; width: 1fr; padding: 0 1; }
    Field:focus { background: $accent 30%; text-style: bold; }
    Field:hover { background: $panel; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter,space", "press", "Change", show=False)]

    value: reactive[str] = reactive("")

    class Pressed(Message):
        """It was chosen."""

        def __init__(self, field: Field) -> None:
            super().__init__()
            self.field = field

        @property
        def control(self) -> Field:
            """The field."""
            return self.field

    def __init__(self, label: str, *, id: str, empty: str = "") -> None:
        super().__init__(id=id)
        self._label, self._empty = label, empty

    def render(self) -> Text:
        """Label and value; the end of a long value is kept, which tells paths apart."""
        line = Text(no_wrap=True, overflow="crop")
        width = self.content_size.width
        if width >= 22 or not (self.value or self._empty):
            line.append(f"{self._label} ", style="dim" if self.value or self._empty else "bold")
        room = width - cell_len(line.plain) - (2 if self.value or self._empty else 0)
        shown = visible(self.value)
        if cell_len(shown) > max(1, room):
            kept = shown[-max(1, room - 1) :]
            while cell_len(kept) > max(0, room - 1):
                kept = kept[1:]
            shown = glyphs().more + kept
        if self.value:
            line.append(shown, style="bold")
        elif self._empty:
            line.append(set_cell_size(self._empty, max(1, min(room, cell_len(self._empty)))), style="italic")
        if self.value or self._empty:
            line.append(f" {glyphs().down}", style="dim")
        return line

    def on_click(self, event: events.Click) -> None:
        """The mouse does what enter does."""
        event.stop()
        self.action_press()

    def action_press(self) -> None:
        """Says that it was chosen."""
        self.post_message(self.Pressed(self))
