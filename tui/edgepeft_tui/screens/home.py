"""Home: the machine, the runs, the adapters and the models at one glance."""

from __future__ import annotations

from typing import ClassVar, cast

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical
from textual.widgets import OptionList, Static

from edgepeft_tui.actions import bindings
from edgepeft_tui.messages import MachineRead, ShelvesRead
from edgepeft_tui.screens.room import Room
from edgepeft_tui.text import visible
from edgepeft_tui.widgets.memory_bars import MemoryBars
from edgepeft_tui.widgets.shelf import Shelf

_FIRST_STEPS = (
    "Nothing was trained here yet.\n"
    "d  plan a first run: the embedded model on the demo's alerts; enter starts it\n"
    "n  plan a run of your own: model, data, and what fits    s  find base models on this disk"
)
_ROOMS = {"runs": ("train", "run"), "adapters": ("chat", "adapter"), "models": ("plan", "model")}
"""Where enter on a row goes, and what the row is called there."""


class HomeScreen(Room):
    """Shows what exists and keeps it fresh; the app's workers do the reading."""

    AREA = "home"
    CSS_PATH = "home.tcss"
    BINDINGS: ClassVar[list[BindingType]] = bindings("home")
    HELP = (
        "Home shows the machine, the runs with their true state, the adapters and the models. Move between the lists "
        "with tab or r, a, m. Enter watches a run, chats with an adapter, or plans a run on a model; the line above "
        "the footer is the command that does the same in a shell."
    )

    def content(self) -> ComposeResult:
        """Machine, three shelves, the command line."""
        with Vertical(id="machine", classes="frame"):
            yield MemoryBars(id="memory")
        with Horizontal(id="work"):
            yield Shelf(
                "Runs (r)",
                "No run yet: d plans a first one",
                id="runs",
                help="Every run with its true state, read from its folder. Enter watches it.",
            )
            yield Shelf(
                "Adapters (a)",
                "No adapter yet",
                id="adapters",
                help="The newest version of each adapter. Enter chats with it; F6 shows more and does more with them.",
            )
        yield Shelf(
            "Models (m)",
            "No model yet: s finds those on this disk",
            id="models",
            help="Base models of the store, and how their files hold the weights. Enter plans a run on one.",
        )
        yield Static("", id="next", markup=False)

    def on_mount(self) -> None:
        """Names the machine's frame."""
        self.query_one("#machine").border_title = "Machine"

    @on(MachineRead)
    def _machine_read(self, message: MachineRead) -> None:
        self.query_one(MemoryBars).bars = message.machine.bars
        self.query_one("#machine").border_title = Text(f"Machine · {visible(message.machine.title)}").markup

    @on(ShelvesRead)
    def _shelves_read(self, message: ShelvesRead) -> None:
        shelves = message.shelves
        for shelf, rows in (("runs", shelves.runs), ("adapters", shelves.adapters), ("models", shelves.models)):
            self.query_one(f"#{shelf}", Shelf).show_rows(rows)
        if shelves.troubles:
            self._show_next(Text("cannot be read: " + visible("; ".join(shelves.troubles)), style="red"))
        elif not (shelves.runs or shelves.adapters):
            self._show_next(Text(_FIRST_STEPS))
        else:
            self._show_command()

    @on(OptionList.OptionHighlighted)
    def _row_highlighted(self) -> None:
        self._show_command()

    @on(OptionList.OptionSelected)
    async def _row_selected(self, event: OptionList.OptionSelected) -> None:
        shelf = cast(Shelf, event.option_list)
        if shelf.selected_row is not None:
            room, what = _ROOMS[str(shelf.id)]
            await self._app.go(room, **{what: shelf.selected_row.key})

    def on_descendant_focus(self) -> None:
        """Another list has the focus, and with it another command is next."""
        self._show_command()

    def action_focus_shelf(self, shelf: str) -> None:
        """Moves the focus to one of the lists."""
        self.query_one(f"#{shelf}", Shelf).focus()

    async def action_new_run(self) -> None:
        """Plans a run on the highlighted model."""
        row = self.query_one("#models", Shelf).selected_row
        await self._app.go("plan", **({"model": row.key} if row is not None else {}))

    async def action_plan_demo(self) -> None:
        """Plans a run of the demo."""
        await self._app.go("plan", demo=True)

    async def action_scan_models(self) -> None:
        """Looks for models where a run is planned."""
        await self._app.go("plan", scan=True)

    def _show_command(self) -> None:
        focused = self.focused
        row = focused.selected_row if isinstance(focused, Shelf) else None
        if row is not None:
            self._show_next(Text.assemble(("next  ", "dim"), visible(row.command)))

    def _show_next(self, text: Text) -> None:
        self.query_one("#next", Static).update(text)
