"""What happened in a run, the newest on top."""

from __future__ import annotations

import textwrap
import time

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.widgets import Static

from edgepeft_tui.run_view import LogLine, Tone
from edgepeft_tui.text import visible

_STYLES: dict[Tone, str] = {"plain": "", "good": "green", "warning": "yellow", "bad": "bold red"}
_INDENT = 6


class EventLog(VerticalScroll):
    """Lines with their time of day; long ones are broken between words below it."""

    HELP = "What happened in this run, the newest on top: checkpoints, evaluations, what ran out and what was done."

    def __init__(self, *, id: str, classes: str = "") -> None:
        super().__init__(id=id, classes=classes)
        self._lines: tuple[LogLine, ...] = ()
        self._drawn: tuple[tuple[LogLine, ...], int] | None = None

    def compose(self) -> ComposeResult:
        """One text that scrolls."""
        yield Static("", markup=False)

    def show(self, lines: tuple[LogLine, ...]) -> None:
        """Shows `lines`, of which the newest is the last."""
        self._lines = lines
        self._draw()

    def on_resize(self) -> None:
        """Breaks the lines anew."""
        self._draw()

    def _draw(self) -> None:
        width = max(24, self.scrollable_content_region.width)
        if self._drawn == (self._lines, width):
            return
        self._drawn = self._lines, width
        text = Text()
        for line in reversed(self._lines):
            pieces = textwrap.wrap(visible(line.text), width - _INDENT) or [""]
            text.append(time.strftime("%H:%M ", time.localtime(line.time)), style="dim")
            text.append(("\n" + " " * _INDENT).join(pieces) + "\n", style=_STYLES[line.tone])
        self.query_one(Static).update(text)
