"""One of a few words, on one line: the arrow keys go on to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget

from edgepeft_tui.text import visible


class Cycle(Widget, can_focus=True):
    """Shows the word that is chosen, and what it means."""

    DEFAULT_CSS = """
    Cycle { height: 1; width: 1fr; }
    Cycle:focus { background: $accent 25%; text-style: bold; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("right,space", "turn(1)", "Next", id="cycle.next", tooltip="Choose the next word"),
        Binding("left", "turn(-1)", "Previous", id="cycle.previous", tooltip="Choose the word before"),
    ]

    at: reactive[int] = reactive(0)

    class Changed(Message):
        """Another word is chosen."""

    def __init__(self, words: Sequence[tuple[str, str]], value: str = "", *, id: str) -> None:
        """Args: `words` are (word, what it means)."""
        super().__init__(id=id)
        self._words = tuple(words)
        self.set_reactive(Cycle.at, next((at for at, (word, _) in enumerate(words) if word == value), 0))

    @property
    def value(self) -> str:
        """The word that is chosen."""
        return self._words[self.at][0]

    def render(self) -> Text:
        """`< word >  meaning`."""
        word, meaning = self._words[self.at]
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append("< ", style="dim")
        line.append(visible(word))
        line.append(" >", style="dim")
        line.append(f"  {visible(meaning)}" if meaning else "", style="dim")
        return line

    def action_turn(self, by: int) -> None:
        """Goes on to another word."""
        self.at = (self.at + by) % len(self._words)
        self.post_message(self.Changed())

    def on_click(self) -> None:
        """The next word."""
        self.action_turn(1)
