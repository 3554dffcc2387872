"""The app: its screens, its keys and the workers that look at the machine and the folders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from textual import work
from textual.app import App
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.screen import Screen

from edgepeft_tui.messages import MachineRead, ShelvesRead
from edgepeft_tui.readings import read_machine, read_shelves
from edgepeft_tui.screens.home import HomeScreen

MACHINE_SECONDS = 1.0
SHELVES_SECONDS = 2.0


class EdgepeftApp(App[None]):
    """The terminal UI."""

    TITLE = "edgepeft"
    MODES: ClassVar[dict[str, str | Callable[[], Screen[Any]]]] = {"home": HomeScreen}
    DEFAULT_MODE = "home"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f1", "show_help_panel", "Help", id="app.help", tooltip="Keys of the focused list"),
        Binding("f2", "switch_mode('home')", "Home", id="app.home", tooltip="Machine, runs, adapters, models"),
        Binding("f5", "refresh_now", "Refresh", id="app.refresh", show=False, tooltip="Look again now"),
        Binding("f10", "quit", "Quit", id="app.quit", tooltip="Leave; runs go on"),
    ]

    def on_mount(self) -> None:
        """Looks at once, then at intervals; a worker belongs to the App, so that no screen change ends it."""
        theme = _chosen_theme()
        if theme in self.available_themes:
            self.theme = theme
        self.set_interval(MACHINE_SECONDS, self._look_at_machine)
        self.set_interval(SHELVES_SECONDS, self._look_at_shelves)
        self.action_refresh_now()

    def action_refresh_now(self) -> None:
        """Looks at the machine and the folders now."""
        self._look_at_machine()
        self._look_at_shelves()

    @work(thread=True, exclusive=True, group="machine", exit_on_error=False)
    def _look_at_machine(self) -> None:
        self._tell_screen(MachineRead(read_machine()))

    @work(thread=True, exclusive=True, group="shelves", exit_on_error=False)
    def _look_at_shelves(self) -> None:
        self._tell_screen(ShelvesRead(read_shelves()))

    def _tell_screen(self, message: Message) -> None:
        # Posting is safe from any thread, and a message to an app that has ended is dropped.
        if self.is_running:
            self.screen.post_message(message)


def _chosen_theme() -> str:
    from edgepeft.errors import EdgepeftError
    from edgepeft.settings import settings

    try:
        return settings().theme or "textual-dark"
    except EdgepeftError:
        return "textual-dark"


def run_app() -> None:
    """Opens the UI and returns when it is left."""
    EdgepeftApp().run()
