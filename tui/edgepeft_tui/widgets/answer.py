"""One answer, drawn as Markdown while it comes."""

from __future__ import annotations

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Static

from edgepeft_tui.chat.segments import Segments
from edgepeft_tui.text import visible, visible_lines
from edgepeft_tui.widgets.safe_markdown import SafeMarkdown


class AnswerView(Vertical):
    """Who answers, the answer in parts, and a line on how it ended."""

    def __init__(self, caption: str = "", text: str = "") -> None:
        super().__init__(classes="answer")
        self._caption = caption
        self._segments = Segments()
        self._first = self._segments.push(text)

    def compose(self) -> ComposeResult:
        """The caption, and what is known of the answer already."""
        if self._caption:
            yield Static(Text(visible(self._caption)), classes="caption")
        for part in self._first:
            yield SafeMarkdown(part)

    async def grow(self, piece: str) -> None:
        """Draws the next piece; call it at most ten times a second."""
        going_on, *new = self._segments.push(piece)
        if going_on:
            last = next(child for child in reversed(self.children) if isinstance(child, SafeMarkdown))
            await last.append(visible_lines(going_on))
        for part in new:
            await self.mount(SafeMarkdown(part))

    async def end(self, note: str, *, trouble: bool = False) -> None:
        """Says how it ended; an empty note says nothing."""
        if note:
            await self.mount(Static(Text(visible_lines(note)), classes="trouble" if trouble else "note"))
