"""The line above the chat: who answers, how fast, and how full the context is."""

from __future__ import annotations

from rich.cells import cell_len, set_cell_size
from rich.text import Text
from textual import events
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget

from edgepeft_tui.chat.lane import Lane
from edgepeft_tui.chat.talk import Talk
from edgepeft_tui.glyphs import glyphs
from edgepeft_tui.text import visible

_WIDE = 76
"""Columns of its own from which on everything has its word."""


def figures_of(lane: Lane, context_length: int | None, *, short: bool = False) -> str:
    """`ctx   612 / 8,192    71.0 tok/s`; the same width whatever the numbers are."""
    speed = "   n/a" if lane.tokens_per_second is None else f"{lane.tokens_per_second:6.1f}"
    total = "n/a" if context_length is None else f"{context_length:,}"
    if short:
        return f"{lane.context_tokens:>{len(total)},}/{total}{speed} t/s"
    return f"ctx {lane.context_tokens:>{len(total)},} / {total} {speed} tok/s"


class ChatLine(Widget):
    """Model and adapter on the left, figures or what is being loaded on the right; both sides can be clicked."""

    DEFAULT_CSS = """
    ChatLine { height: 1; padding: 0 1; }
    """
    HELP = "A click on the model chooses another base, one on the adapter another adapter."

    left: reactive[tuple[str, str]] = reactive(("", ""))
    """Model, and who answers."""
    place: reactive[str] = reactive("")
    """Which lane is meant where there are several."""
    right: reactive[tuple[str, str]] = reactive(("", ""))
    """What is told on the right, and a shorter form of it."""

    class Clicked(Message):
        """A part was clicked: `model` or `adapter`."""

        def __init__(self, part: str) -> None:
            super().__init__()
            self.part = part

    def read(self, talk: Talk) -> None:
        """Takes what the chat is in."""
        setup, lane = talk.setup, talk.lane
        model = f"{setup.entry.name} {setup.precision}" if setup is not None else talk.start.model or "no model"
        adapters = lane.label if setup is not None else " + ".join(talk.start.adapters) or "base"
        self.left = (visible(model), visible(adapters))
        self.place = f"lane {talk.current + 1} of {len(talk.lanes)}" if talk.comparing else ""
        context = setup.entry.shape.context_length if setup is not None else None
        if talk.loading:
            told = f"{visible(talk.loading)} {glyphs().more}"
            self.right = (told, told)
        else:
            self.right = (figures_of(lane, context), figures_of(lane, context, short=True))

    def render(self) -> Text:
        """One line; names give way before figures do, and the adapter, which its frame names too, before the model."""
        model, adapters = self.left
        width = self.size.width
        right = self.right[0] if width >= _WIDE else self.right[1]
        room = max(0, width - cell_len(right) - 2)
        word = f"  {self.place or 'adapter'} [" if width >= _WIDE else " ["
        left = room - cell_len(word) - 1
        shown = _cut(model, max(6, left - min(cell_len(adapters), 8)))
        line = Text(no_wrap=True, overflow="crop")
        line.append(shown, style="bold")
        line.append(word, style="dim")
        line.append(_cut(adapters, max(4, left - cell_len(shown))), style="bold")
        line.append("]", style="dim")
        line.append(" " * max(1, width - cell_len(line.plain) - cell_len(right)))
        line.append(right, style="dim")
        return line

    def on_click(self, event: events.Click) -> None:
        """Chooses what was clicked."""
        model = self.render().plain.partition("[")[0]
        self.post_message(self.Clicked("model" if event.x - self.gutter.left < cell_len(model) - 1 else "adapter"))


def _cut(text: str, width: int) -> str:
    return text if cell_len(text) <= width else set_cell_size(text, max(0, width - 1)) + glyphs().more
