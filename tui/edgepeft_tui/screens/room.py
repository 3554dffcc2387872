"""What every screen has: the top line, the footer, its breakpoints, and how the app talks to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

from textual import on
from textual.app import ComposeResult
from textual.screen import Screen
from textual.widgets import Footer, Static

from edgepeft_tui.messages import MachineRead
from edgepeft_tui.widgets.top_line import TopLine

if TYPE_CHECKING:
    from edgepeft_tui.app import EdgepeftApp

SMALLEST = (48, 14)
"""Columns and lines below which a screen says so instead of drawing itself."""


class Room(Screen[None]):
    """One of the six screens.

    Subclasses name their `AREA`, give `content`, and may take `show` (what another screen wants seen) and the app's
    messages. Classes `-narrow` (below 80 columns), `-normal`, `-wide` (120 and more), `-flat` (below 24 lines) and
    `-tall` (36 and more) are set by the terminal's size.
    """

    AREA: ClassVar[str]
    HORIZONTAL_BREAKPOINTS = [
        (0, "-tiny"),
        (SMALLEST[0], "-narrow"),
        (80, "-normal"),
        (120, "-wide"),
    ]
    VERTICAL_BREAKPOINTS = [
        (0, "-low"),
        (SMALLEST[1], "-flat"),
        (24, "-medium"),
        (36, "-tall"),
    ]

    def compose(self) -> ComposeResult:
        """Top line, content, footer; and the word that is shown where nothing fits."""
        yield TopLine(self.AREA)
        yield from self.content()
        yield Footer(show_command_palette=False)
        wide, high = SMALLEST
        yield Static(f"This terminal is too small.\nIt needs {wide} columns and {high} lines.", id="too-small")

    def content(self) -> ComposeResult:
        """The screen's own parts."""
        raise NotImplementedError

    @property
    def _app(self) -> EdgepeftApp:
        """The app, with what it has beyond any app."""
        return cast("EdgepeftApp", self.app)

    def show(self, **what: Any) -> None:
        """Shows what another screen asks for."""

    @on(MachineRead)
    def _machine_was_read(self, message: MachineRead) -> None:
        self.query_one(TopLine).device = message.machine.title
