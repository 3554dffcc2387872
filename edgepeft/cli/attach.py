"""Following a run at the terminal: the live lines, the question that Ctrl-C asks, and the outcome as an exit code."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from edgepeft.cli.output import line, note, stderr
from edgepeft.cli.run_text import summary_lines
from edgepeft.errors import ExitCode
from edgepeft.plan.train_plan import TrainPlan
from edgepeft.runs.control import request
from edgepeft.runs.events import Event, Failed, Finished, StepDone
from edgepeft.runs.events_file import encode_event
from edgepeft.runs.launch import log_tail
from edgepeft.runs.layout import RunFolder
from edgepeft.runs.rescue import ending_of, rescue
from edgepeft.runs.state import RunState, RunWatch, read_state
from edgepeft.runs.text import PHASES, lost_text, memory_text, plain_line, rescued_text, sentence
from edgepeft.units import format_seconds, format_watt_hours

_POLL_SECONDS = 0.2
_RESCUE_SECONDS = 1.0
"""How long it takes at the most until one who starts a killed worker again is seen doing so."""
_PLAIN_SECONDS = 10.0
"""Least time between two step lines where no line can be redrawn."""


class Interrupts:
    """Counts Ctrl-C and termination requests instead of being torn out of the work by them."""

    def __init__(self) -> None:
        self.count = 0
        self.terminated = False

    def take(self) -> int:
        """The number that came since the last call."""
        taken, self.count = self.count, 0
        return taken

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.terminated = self.terminated or number == signal.SIGTERM

    @contextmanager
    def caught(self) -> Iterator[Interrupts]:
        """Within it, SIGINT and SIGTERM are counted; before and after it they act as usual."""
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def attach(run: RunFolder, plan: TrainPlan, *, as_json: bool = False, told: RunWatch | None = None) -> int:
    """Follows a run until its worker ends or the user detaches, and returns the exit code of its outcome.

    A worker that is killed meanwhile, or whose card fails, is started again once, with a smaller layout.

    Args:
        run: the run.
        plan: its plan, for the number of steps and the predicted peak.
        as_json: write every event as a JSON line to stdout, and nothing else.
        told: a watch that has read the events which need not be told any more; JSON has them all.
    """
    watch = RunWatch(run, plan.steps) if told is None or as_json else told
    with Interrupts().caught() as interrupts:
        if as_json:
            view: _View = _JsonView()
        elif stderr.is_terminal and sys.stdin.isatty():
            view = _LiveView(plan)
        else:
            view = _PlainView(plan)
        stopping = worked = False
        with view:
            while True:
                events, state = watch.poll()
                view.show(events, state)
                if not state.alive:
                    if worked and not stopping and _goes_on(run, state, view):
                        continue
                    break
                worked = True
                if interrupts.take():
                    answer = "detach" if stopping else view.ask(run, terminated=interrupts.terminated)
                    if answer == "detach":
                        view.close()
                        return _detached(run, as_json)
                    if answer == "stop":
                        stopping = True
                        request(run, "stop")
                        view.tell("Stopping after this step, then saving. Ctrl-C again leaves it to itself.")
                time.sleep(_POLL_SECONDS)
    return report_outcome(run, plan, watch.folded.ending, state, as_json=as_json)


def _goes_on(run: RunFolder, state: RunState, view: _View) -> bool:
    """Whether a run whose worker has just ended has a new one, from here or from somebody else who follows it."""
    ending = ending_of(run, state)
    if ending is None:
        return False
    if rescue(run, ending):
        view.tell(rescued_text(state, ending), "yellow")
        return True
    time.sleep(_RESCUE_SECONDS)
    return read_state(run).alive


def report_outcome(
    run: RunFolder, plan: TrainPlan, ending: Finished | Failed | None, state: RunState, *, as_json: bool = False
) -> int:
    """Tells how a run ended, on stdout where it went well, and returns the exit code for it."""
    if isinstance(ending, Finished):
        if not as_json:
            for text in summary_lines(ending, str(run.path), plan.spec.recipe.base.model):
                line(text)
            if ending.stopped:
                line(f"         edgepeft runs resume {run.id}   (trains the rest)")
            elif ending.ended_by == "time":
                line(f"         edgepeft runs resume {run.id} --max-time TIME   (trains on)")
        return ExitCode.INTERRUPTED if ending.stopped else ExitCode.DONE
    if isinstance(ending, Failed):
        note(f"edgepeft: run {run.id} failed: {ending.message}", "red")
        if ending.traceback:
            note(f"The traceback is in {run.log_file}")
        return ending.exit_code
    note(f"edgepeft: {lost_text(run.id, state, again=run.rescued_file.exists())}", "red")
    for text in log_tail(run, 5):
        note(f"  {text}")
    return ExitCode.INTERRUPTED


def _detached(run: RunFolder, as_json: bool) -> int:
    if not as_json:
        note(f"Run {run.id} goes on. Come back with `edgepeft runs attach {run.id}`.", None)
    return ExitCode.DONE


class _View:
    """Where events and the state are shown; this one shows nothing and stops the run when interrupted."""

    def __enter__(self) -> _View:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def show(self, events: list[Event], state: RunState) -> None:
        """Shows what is new."""

    def tell(self, text: str, style: str = "") -> None:
        """One line that stays."""
        note(text, style or None)

    def ask(self, run: RunFolder, *, terminated: bool) -> str:
        """What an interruption means: stop, detach or go on."""
        return "stop"

    def close(self) -> None:
        """Leaves the terminal as it was; a second call does nothing."""


class _JsonView(_View):
    def show(self, events: list[Event], state: RunState) -> None:
        for event in events:
            sys.stdout.write(encode_event(event).decode())
        if events:
            sys.stdout.flush()


class _PlainView(_View):
    """Lines for a log: every event worth a sentence, and steps at a modest rate."""

    def __init__(self, plan: TrainPlan) -> None:
        self._predicted_bytes = plan.memory.peak_bytes
        self._last_step_line = 0.0

    def show(self, events: list[Event], state: RunState) -> None:
        newest_step = max((index for index, event in enumerate(events) if isinstance(event, StepDone)), default=-1)
        for index, event in enumerate(events):
            told = sentence(event)
            if told is not None:
                self.tell(*told)
            elif isinstance(event, StepDone):
                if index == newest_step and self._step_is_due(event, state):
                    self.tell(plain_line(event, state, self._predicted_bytes) or "")
            elif text := plain_line(event, state, self._predicted_bytes):
                self.tell(text)

    def _step_is_due(self, event: StepDone, state: RunState) -> bool:
        now = time.monotonic()
        if now - self._last_step_line < _PLAIN_SECONDS and event.step not in (1, state.steps):
            return False
        self._last_step_line = now
        return True


class _LiveView(_View):
    """Two lines that are redrawn in place, below the lines that stay."""

    def __init__(self, plan: TrainPlan) -> None:
        self._predicted_bytes = plan.memory.peak_bytes
        self._state = RunState(status="starting", steps=plan.steps)
        self._began = time.monotonic()
        self._seconds_before: float | None = None
        self._live = Live(console=stderr, get_renderable=self._render, refresh_per_second=4, transient=True)
        self._live.start()

    def show(self, events: list[Event], state: RunState) -> None:
        self._state = state
        if self._seconds_before is None:
            # Of a run that is joined: what it trained until now. Clocks jump, sums of durations do not.
            self._seconds_before = state.train_seconds
        for event in events:
            told = sentence(event)
            if told is not None:
                self.tell(*told)

    def tell(self, text: str, style: str = "") -> None:
        # Above the live lines, and broken between words.
        stderr.print(Text(text, style=style), soft_wrap=False)

    def ask(self, run: RunFolder, *, terminated: bool) -> str:
        if terminated:
            return "stop"
        self._live.stop()
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            answer = input("[d]etach and keep it running, [s]top and save, or enter to go on: ").strip().lower()
        except (KeyboardInterrupt, EOFError):
            # A second Ctrl-C, or a terminal that went away: neither may end hours of work.
            sys.stderr.write("\n")
            return "detach"
        finally:
            signal.signal(signal.SIGINT, handler)
        if answer[:1] == "d":
            return "detach"
        self._live.start()
        return "stop" if answer[:1] == "s" else "go on"

    def close(self) -> None:
        self._live.stop()

    def _render(self) -> Group:
        return live_lines(
            self._state, self._predicted_bytes, (self._seconds_before or 0.0) + time.monotonic() - self._began
        )


def live_lines(state: RunState, predicted_peak_bytes: int, elapsed_seconds: float) -> Group:
    """The two live lines; they fit into 80 columns."""
    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True)
    training = state.phase == "train" or (not state.phase and state.step > 0)
    name = PHASES.get(state.phase, "Starting")
    done: float | None = state.phase_fraction
    if training and state.steps:
        done = state.step / state.steps
    bar = ProgressBar(total=1.0, completed=done or 0.0, pulse=done is None)
    right = f"step {state.step:,}/{state.steps:,}"
    if state.loss is not None:
        right += f"  loss {state.loss:.4f}"
    grid.add_row(Text(name, style="bold"), bar, Text(right))
    figures = []
    if state.tokens_per_second is not None:
        figures.append(f"{state.tokens_per_second:,.0f} tok/s")
    figures.append(memory_text(state, predicted_peak_bytes))
    clock = format_seconds(elapsed_seconds)
    figures.append(clock if state.eta_seconds is None else f"{clock}, ETA {format_seconds(state.eta_seconds)}")
    if state.power_watts is not None:
        figures.append(f"{state.power_watts:.0f} W")
    if state.energy_wh is not None:
        figures.append(format_watt_hours(state.energy_wh))
    if state.phase_detail and (not training or state.tokens_per_second is None):
        figures = [state.phase_detail, clock]
    return Group(grid, Text(" · ".join(figures), style="dim", no_wrap=True, overflow="ellipsis"))
