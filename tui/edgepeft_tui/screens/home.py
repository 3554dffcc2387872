"""Home: the machine, the runs, the adapters and the models at one glance."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import Screen
from textual.widgets import Footer, OptionList, Static

from edgepeft_tui.messages import MachineRead, ShelvesRead
from edgepeft_tui.text import visible
from edgepeft_tui.widgets.memory_bars import MemoryBars
from edgepeft_tui.widgets.shelf import Shelf

_FIRST_STEPS = (
    "Nothing is here yet. In a shell:  edgepeft demo  trains and scores a first adapter in a few minutes;  "
    "edgepeft models add FOLDER  brings a model;  edgepeft train MODEL DATA --name N  trains on your own file."
)


class HomeScreen(Screen[None]):
    """Shows what exists and keeps it fresh; the App's workers do the reading."""

    CSS_PATH = "home.tcss"
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (80, "-wide")]
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "focus_shelf('runs')", "Runs", id="home.runs", tooltip="Move to the list of runs"),
        Binding("a", "focus_shelf('adapters')", "Adapters", id="home.adapters", tooltip="Move to the adapters"),
        Binding("m", "focus_shelf('models')", "Models", id="home.models", tooltip="Move to the base models"),
    ]
    HELP = (
        "Home shows the machine, the runs with their true state, the adapters and the models. Move between the lists "
        "with tab or r, a, m; the line above the footer is the command that goes on with the highlighted row."
    )

    def compose(self) -> ComposeResult:
        """Top line, machine, three shelves, the command line, footer."""
        yield Static("", id="title", markup=False)
        with Vertical(id="machine"):
            yield MemoryBars(id="memory")
        with Horizontal(id="work"):
            yield Shelf("Runs (r)", "No run yet", id="runs")
            yield Shelf("Adapters (a)", "No adapter yet", id="adapters")
        yield Shelf("Models (m)", "No model yet: edgepeft models scan finds those on this disk", id="models")
        yield Static("", id="next", markup=False)
        yield Footer()

    def on_mount(self) -> None:
        """Names the machine's frame."""
        self.query_one("#machine").border_title = "Machine"
        self._show_title("")

    @on(MachineRead)
    def _machine_read(self, message: MachineRead) -> None:
        self.query_one(MemoryBars).bars = message.machine.bars
        self._show_title(message.machine.title)

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

    def on_descendant_focus(self) -> None:
        """Another list has the focus, and with it another command is next."""
        self._show_command()

    def action_focus_shelf(self, shelf: str) -> None:
        """Moves the focus to one of the lists."""
        self.query_one(f"#{shelf}", Shelf).focus()

    def _show_command(self) -> None:
        focused = self.focused
        row = focused.selected_row if isinstance(focused, Shelf) else None
        if row is not None:
            self._show_next(Text.assemble(("next  ", "dim"), visible(row.command)))

    def _show_next(self, text: Text) -> None:
        self.query_one("#next", Static).update(text)

    def _show_title(self, device: str) -> None:
        self.query_one("#title", Static).update(
            Text.assemble(("edgepeft", "bold"), ("   " + visible(device) if device else "", ""), ("   offline", "dim"))
        )
