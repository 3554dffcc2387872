"""The app: its screens, its keys and the workers that look at the machine and the folders."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar

from rich.text import Text
from textual import on, work
from textual.app import App, SystemCommand
from textual.binding import BindingType
from textual.message import Message
from textual.screen import Screen
from textual.widget import Widget

from edgepeft.errors import EdgepeftError
from edgepeft_tui.actions import APP, AREAS, all_actions, bindings
from edgepeft_tui.glyphs import choose_glyphs
from edgepeft_tui.messages import MachineRead, ShelvesRead
from edgepeft_tui.readings import Machine, Shelves, read_machine, read_shelves
from edgepeft_tui.screens.adapters import AdaptersScreen
from edgepeft_tui.screens.dialogs import Choice
from edgepeft_tui.screens.help import HelpScreen
from edgepeft_tui.screens.home import HomeScreen
from edgepeft_tui.screens.jump import JumpScreen
from edgepeft_tui.screens.plan import PlanScreen
from edgepeft_tui.screens.room import Room
from edgepeft_tui.screens.settings import SettingsScreen
from edgepeft_tui.screens.train import TrainScreen
from edgepeft_tui.text import visible
from edgepeft_tui.themes import DEFAULT_THEME, OWN_THEMES
from edgepeft_tui.widgets.top_line import TopLine

MACHINE_SECONDS = 1.0
SHELVES_SECONDS = 2.0


def _make_chat() -> Screen[Any]:
    # Markdown and what a conversation is made of load in a tenth of a second, which the first paint need not wait for.
    from edgepeft_tui.screens.chat import ChatScreen

    return ChatScreen()


class EdgepeftApp(App[str]):
    """The terminal UI. It returns what should be said in the shell after it is left."""

    TITLE = "edgepeft"
    CSS_PATH = ["screens/room.tcss", "screens/dialogs.tcss"]
    MODES: ClassVar[dict[str, str | Callable[[], Screen[Any]]]] = {
        "home": HomeScreen,
        "plan": PlanScreen,
        "train": TrainScreen,
        "chat": _make_chat,
        "adapters": AdaptersScreen,
        "settings": SettingsScreen,
    }
    DEFAULT_MODE = "home"
    BINDINGS: ClassVar[list[BindingType]] = bindings("app")
    ENABLE_COMMAND_PALETTE = True

    def __init__(self) -> None:
        super().__init__()
        self._been: list[str] = []
        self._machine: Machine | None = None
        self._shelves: Shelves | None = None
        for theme in OWN_THEMES:
            self.register_theme(theme)

    @property
    def shelves(self) -> Shelves | None:
        """What was last seen of runs, adapters and models; None before the first look."""
        return self._shelves

    def on_mount(self) -> None:
        """Takes the settings and looks at once, then at intervals.

        A worker that looks belongs to the app, so that no screen change ends it.
        """
        self.apply_settings()
        self.set_interval(MACHINE_SECONDS, self._look_at_machine)
        if not self.is_headless and _has_terminal():
            self.set_interval(MACHINE_SECONDS, _end_without_terminal)
        self.set_interval(SHELVES_SECONDS, self._look_at_shelves)
        self.action_refresh_now()

    def apply_settings(self) -> None:
        """Theme, keys, glyphs and spacing as config.toml has them; what is wrong there is told and left out."""
        from edgepeft.settings import Settings, settings

        try:
            chosen = settings()
        except EdgepeftError as error:
            chosen = Settings()
            self.tell_error(error)
        theme = chosen.theme or DEFAULT_THEME
        if theme in self.available_themes:
            self.theme = theme
        else:
            self.tell(f"There is no theme {theme!r}; F7 shows those there are", severity="warning")
        choose_glyphs({"ascii": True, "unicode": False}.get(chosen.glyphs or ""))
        self.set_class(chosen.spacing == "compact", "-compact")
        known = {action.id for action in all_actions()}
        unknown = sorted(set(chosen.keys) - known)
        if unknown:
            self.tell(f"config.toml gives keys to {', '.join(unknown)}, which no action is", severity="warning")
        self.set_keymap({name: keys for name, keys in chosen.keys.items() if name in known})

    # Where to go.

    async def action_go(self, room: str) -> None:
        """Goes to a screen by its mode."""
        await self.go(room)

    async def go(self, room: str, **what: Any) -> None:
        """Goes to a screen, and shows there what `Room.show` of it takes."""
        if room != self.current_mode:
            self._been.append(self.current_mode)
            await self.switch_mode(room)
            self._tell_what_is_known()
        if what and isinstance(self.screen, Room):
            self.screen.show(**what)

    async def action_go_back(self) -> None:
        """Goes to the screen before this one; from the first one to nowhere."""
        if self._been:
            await self.switch_mode(self._been.pop())
            self._tell_what_is_known()

    @on(TopLine.Chosen)
    async def _room_clicked(self, message: TopLine.Chosen) -> None:
        await self.go(message.room)

    def action_show_help(self) -> None:
        """Shows what the focused part is and which keys it has."""
        self.push_screen(HelpScreen(self.screen))

    def action_jump(self) -> None:
        """Puts a letter on every part that can have the focus."""

        def focus(widget: Widget | None) -> None:
            if widget is not None:
                self.screen.set_focus(widget)

        self.push_screen(JumpScreen(self.screen), focus)

    # What is said.

    def tell(self, text: str, *, severity: Any = "information", seconds: float | None = None) -> None:
        """A toast; nothing in it is markup."""
        self.notify(visible(text), severity=severity, timeout=seconds, markup=False)

    def tell_error(self, error: Exception) -> None:
        """A toast for what went wrong: what, where, and what to do next."""
        text = str(error) if isinstance(error, EdgepeftError) else f"{type(error).__name__}: {error}"
        self.tell(text, severity="error", seconds=12)

    # Looking.

    def action_refresh_now(self) -> None:
        """Looks at the machine and the folders now."""
        self._look_at_machine()
        self._look_at_shelves()

    @work(thread=True, exclusive=True, group="machine", exit_on_error=False)
    def _look_at_machine(self) -> None:
        self._tell_app(MachineRead(read_machine()))

    @work(thread=True, exclusive=True, group="shelves", exit_on_error=False)
    def _look_at_shelves(self) -> None:
        self._tell_app(ShelvesRead(read_shelves()))

    def _tell_app(self, message: Message) -> None:
        # Posting is safe from any thread, and a message to an app that has ended is dropped.
        if self.is_running:
            self.post_message(message)

    @on(MachineRead)
    def _machine_read(self, message: MachineRead) -> None:
        self._machine = message.machine
        self._tell_room(MachineRead(message.machine))

    @on(ShelvesRead)
    def _shelves_read(self, message: ShelvesRead) -> None:
        self._shelves = message.shelves
        self._tell_room(ShelvesRead(message.shelves))

    def _tell_what_is_known(self) -> None:
        if self._machine is not None:
            self._tell_room(MachineRead(self._machine))
        if self._shelves is not None:
            self._tell_room(ShelvesRead(self._shelves))

    def _tell_room(self, message: Message) -> None:
        """Tells the screen of the current mode, under whatever dialog covers it."""
        for room in self.screen_stack[:1]:
            room.post_message(message)

    # Commands, and the end.

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """The palette: the actions of this screen and of the app, then the themes."""
        area = screen.AREA if isinstance(screen, Room) else ""
        for name, actions in ((area, AREAS.get(area, ())), ("app", APP)):
            for action in actions:
                owner = screen if name == area else self
                run = partial(self.run_action, action.run, default_namespace=owner)
                yield SystemCommand(f"{name}: {action.label}", f"{action.tooltip} ({action.key})", run)
        for theme in sorted(self.available_themes):
            yield SystemCommand(f"theme: {theme}", "Use these colours now; F7 keeps them", partial(self._use, theme))

    def _use(self, theme: str) -> None:
        self.theme = theme

    async def action_quit(self) -> None:
        """Leaves; with a run active, asks what becomes of it."""
        running = [row.key for row in self._shelves.runs if row.mark == "running"] if self._shelves else []
        if not running:
            self.exit()
            return
        names = ", ".join(visible(name) for name in running[:3]) + (" and others" if len(running) > 3 else "")
        question = f"{names} {'is' if len(running) == 1 else 'are'} training. A run does not need this window."
        answers = (("leave", "Leave it running"), ("stop", "Stop and save"), ("cancel", "Cancel"))
        self.push_screen(Choice(question, answers, title="Quit"), partial(self._quit, running))

    def _quit(self, running: list[str], answer: str | None) -> None:
        if answer == "leave":
            self.exit(f"Still training: {', '.join(running)}. Follow with: edgepeft runs attach {running[0]}")
        elif answer == "stop":
            from edgepeft.runs.control import request
            from edgepeft.runs.layout import open_run

            for name in running:
                try:
                    request(open_run(name).path, "stop")
                except (EdgepeftError, OSError) as error:
                    self.tell_error(error)
                    return
            self.exit(
                f"Stopping after the step that runs: {', '.join(running)}. Resume with: edgepeft runs resume NAME"
            )


def _has_terminal() -> bool:
    return sys.__stdin__ is not None and os.isatty(sys.__stdin__.fileno())


def _end_without_terminal() -> None:
    """Ends the program when its terminal is gone and no signal said so, as under nohup.

    At once, since leaving in good order would draw; runs go on by themselves, conversations are kept as they are held.
    """
    if not _has_terminal():
        os._exit(128 + 1)


def run_app() -> None:
    """Opens the UI and returns when it is left."""
    said = EdgepeftApp().run()
    if said:
        from rich.console import Console

        Console().print(Text(said))
