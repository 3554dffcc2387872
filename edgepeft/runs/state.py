"""What a run is doing now, derived from its events and its lock; nothing about it is stored."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from edgepeft.errors import EdgepeftError
from edgepeft.memory.breakdown import Category
from edgepeft.runs.events import (
    CheckpointSaved,
    EndedBy,
    Evaluated,
    Event,
    Failed,
    Finished,
    MemoryMeasured,
    OutOfMemoryHit,
    PhaseChanged,
    Started,
    StepDone,
    Warned,
)
from edgepeft.runs.events_file import Follower, read_last_events
from edgepeft.runs.layout import RunFolder, list_runs
from edgepeft.runs.lock import is_locked

Status = Literal["starting", "running", "finished", "stopped", "failed", "lost", "damaged"]
EARLY: dict[EndedBy, str] = {
    "early stop": "Ended early after step {step:,} of {steps:,}: the held-out loss did not fall any more",
    "time": "Its training time was over after step {step:,} of {steps:,}",
}
"""What is said of a run that ended by itself before its last step."""
START_SECONDS = 60.0
"""A worker that was started longer ago than this, and never took the lock, is lost."""


class Launched(msgspec.Struct, frozen=True):
    """launched.json: the latest start of a worker."""

    time: float
    """Seconds since 1970."""
    events_bytes: int | None = None
    """Size of events.jsonl at that moment: once it has grown, the worker has spoken, whatever the clock says."""
    pid: int | None = None
    """The worker's process, to end one that hangs; never a sign of life."""
    took_lock: bool = False
    """Whether the launcher saw the worker hold the lock; from then on the lock alone tells its life."""

    old_data: bool = False
    """Whether it was to go on with cached tokens where a data file had changed or was gone."""


class RunState(msgspec.Struct, frozen=True):
    """A run at one moment."""

    status: Status
    step: int = 0
    """Optimizer steps done; steps that a resume voided do not count."""
    steps: int = 0
    """Steps of the whole run."""
    loss: float | None = None
    """Of the latest step."""
    eval_loss: float | None = None
    """Of the latest evaluation."""
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    train_seconds: float = 0.0
    """Spent in the steps that count; a sum of durations, not a difference of clocks."""
    live_bytes: int | None = None
    peak_bytes: int | None = None
    """Highest measured, over all workers of the run."""
    power_watts: float | None = None
    """Of the latest step; None where no sensor may be read."""
    energy_wh: float | None = None
    """Since the run began, of the steps that count."""
    phase: str = ""
    """load, data, train, evaluate or save; empty before the first."""
    phase_detail: str = ""
    phase_fraction: float | None = None
    started_at: float | None = None
    """When the latest worker said its first word, seconds since 1970; None when that was not read."""
    updated_at: float | None = None
    """Time of the latest event."""
    checkpoint_step: int | None = None
    """Step of the latest checkpoint."""
    published: str = ""
    """`NAME@vK`, once it is in the library."""
    message: str = ""
    """Why it failed, was lost, is damaged, or ended before its last step."""
    ended_by: EndedBy | None = None
    """Why a finished or stopped run ended."""
    exit_code: int | None = None
    """Of a failed run."""
    warnings: int = 0
    ooms: int = 0
    """How often memory ran out."""
    skipped_lines: int = 0
    """Lines of the event file that could not be read."""

    @property
    def alive(self) -> bool:
        """Whether a worker is at it, or about to be."""
        return self.status in ("starting", "running")

    @property
    def resumable(self) -> bool:
        """Whether `resume` would start a worker."""
        return self.status in ("lost", "failed", "stopped")

    @property
    def wants_time(self) -> bool:
        """Whether `resume` would start a worker if it were given more time."""
        return self.status == "finished" and self.ended_by == "time"


class RunFold:
    """Folds events into a state one at a time, so that a follower never reads anything twice."""

    def __init__(self, steps: int = 0) -> None:
        """`steps` is the plan's count, for as long as no `started` tells it."""
        self.history: list[StepDone] = []
        """The steps that count, in order."""
        self.evaluations: list[Evaluated] = []
        """The evaluations that count, in order."""
        self.ending: Finished | Failed | None = None
        """How the latest worker ended, when it did."""
        self._state = RunState(status="starting", steps=steps)

    def add(self, event: Event) -> None:
        """Takes one more event."""
        state = self._state
        changes: dict[str, object] = {"updated_at": event.time}
        match event:
            case Started():
                self._begin(event)
                changes |= {
                    "started_at": event.time,
                    "step": event.step,
                    "steps": event.steps,
                    "train_seconds": sum(done.seconds for done in self.history),
                    "loss": self.history[-1].loss if self.history else None,
                    "eval_loss": self.evaluations[-1].loss if self.evaluations else None,
                    "eta_seconds": None,
                    "ended_by": None,
                    "live_bytes": None,
                    "power_watts": None,
                    "energy_wh": self.history[-1].energy_wh if self.history else None,
                    "phase": "",
                    "phase_detail": "",
                    "phase_fraction": None,
                }
            case PhaseChanged():
                changes |= {
                    "phase": event.name,
                    "phase_detail": event.detail,
                    "phase_fraction": event.fraction,
                }
            case StepDone():
                self.history.append(event)
                changes |= {
                    "step": event.step,
                    "loss": event.loss,
                    "tokens_per_second": event.tokens_per_second,
                    "train_seconds": state.train_seconds + event.seconds,
                    "eta_seconds": event.eta_seconds,
                    "live_bytes": event.live_bytes,
                    "peak_bytes": _larger(state.peak_bytes, event.peak_bytes),
                    "power_watts": event.power_watts,
                    "energy_wh": event.energy_wh,
                }
            case Evaluated():
                if self.evaluations and self.evaluations[-1].step == event.step:
                    # Killed before its first checkpoint, a run measures its base again.
                    self.evaluations.pop()
                self.evaluations.append(event)
                changes["eval_loss"] = event.loss
            case MemoryMeasured():
                changes |= {
                    "live_bytes": event.live_bytes,
                    "peak_bytes": _larger(state.peak_bytes, event.peak_bytes),
                }
            case CheckpointSaved():
                changes["checkpoint_step"] = event.step
            case Warned():
                changes["warnings"] = state.warnings + 1
            case OutOfMemoryHit():
                changes["ooms"] = state.ooms + 1
            case Finished():
                self.ending = event
                changes |= {
                    "step": event.step,
                    "published": event.published,
                    "ended_by": "request" if event.stopped else event.ended_by,
                    "eval_loss": event.eval_loss if event.eval_loss is not None else state.eval_loss,
                    "peak_bytes": _larger(state.peak_bytes, event.measured_peak_bytes),
                    "tokens_per_second": event.tokens_per_second,
                    "energy_wh": event.energy_wh if event.energy_wh is not None else state.energy_wh,
                    "power_watts": None,
                    "eta_seconds": None,
                }
            case Failed():
                self.ending = event
                changes["eta_seconds"] = None
            case _:
                pass
        self._state = msgspec.structs.replace(state, **changes)

    def _begin(self, event: Started) -> None:
        self.ending = None
        self.history = [done for done in self.history if done.step <= event.step]
        self.evaluations = [found for found in self.evaluations if found.step <= event.step]

    def state(
        self,
        lock_held: bool,
        *,
        launched: Launched | None = None,
        now: float | None = None,
        events_bytes: int | None = None,
        skipped_lines: int = 0,
    ) -> RunState:
        """The state, given what was seen of the lock *before* the last events were read.

        Args:
            lock_held: whether a worker lives.
            launched: the latest start.
            now: seconds since 1970.
            events_bytes: of the event file, as far as its events were added.
            skipped_lines: that could not be read.
        """
        silent = launched is not None and self._is_silent(launched, events_bytes)
        status, message, exit_code = self._status(lock_held, launched, silent, time.time() if now is None else now)
        return msgspec.structs.replace(
            self._state,
            status=status,
            message=message,
            exit_code=exit_code,
            skipped_lines=skipped_lines,
        )

    def _is_silent(self, launched: Launched, events_bytes: int | None) -> bool:
        """Whether the latest worker has not said anything yet."""
        if launched.events_bytes is None or events_bytes is None:
            return (self._state.updated_at or 0.0) < launched.time
        return events_bytes <= launched.events_bytes

    def _status(
        self, lock_held: bool, launched: Launched | None, silent: bool, now: float
    ) -> tuple[Status, str, int | None]:
        if lock_held and (silent or self._state.updated_at is None):
            return "starting", "", None
        if lock_held and self.ending is None:
            return "running", "", None
        if launched is not None and silent and not launched.took_lock and abs(now - launched.time) < START_SECONDS:
            return "starting", "", None
        if isinstance(self.ending, Finished):
            early = EARLY.get(self.ending.ended_by, "").format(step=self._state.step, steps=self._state.steps)
            return ("stopped", "", None) if self.ending.stopped else ("finished", early, None)
        if isinstance(self.ending, Failed):
            return "failed", self.ending.message, self.ending.exit_code
        return "lost", f"The worker ended without a word after step {self._state.step}", None


def fold(
    events: Iterable[Event],
    lock_held: bool,
    *,
    launched: Launched | None = None,
    now: float | None = None,
    steps: int = 0,
) -> RunState:
    """The state that `events` and the lock tell; the lock must have been looked at before the events were read.

    Args:
        events: in file order.
        lock_held: whether a worker lives.
        launched: the latest start, which keeps a worker that is still loading Python from being called lost.
        now: seconds since 1970.
        steps: the plan's count of steps, for a run without events.
    """
    folded = RunFold(steps)
    for event in events:
        folded.add(event)
    return folded.state(lock_held, launched=launched, now=now)


class RunWatch:
    """Follows one run: every call of `poll` reads only what is new."""

    def __init__(self, run: RunFolder, steps: int = 0) -> None:
        self.run = run
        self.folded = RunFold(steps)
        self._steps = steps
        self._follower = Follower(run.events_file)
        self._restarts = 0

    def poll(self) -> tuple[list[Event], RunState]:
        """The events since the last call, and the state after them.

        Raises:
            DiskProblem: a file of the run may not be read.
        """
        events, state = self._poll()
        if state.status == "lost":
            # Or a worker took the lock after it was looked at, and spoke before its events were read.
            more, state = self._poll()
            events += more
        return events, state

    def _poll(self) -> tuple[list[Event], RunState]:
        launched, lock_held = look(self.run)
        events = self._follower.read()
        if self._follower.restarts != self._restarts:
            self._restarts = self._follower.restarts
            self.folded = RunFold(self._steps)
        for event in events:
            self.folded.add(event)
        return events, self.folded.state(
            lock_held, launched=launched, events_bytes=self._follower.read_bytes, skipped_lines=self._follower.skipped
        )


class HighestMemory(msgspec.Struct, frozen=True):
    """A run's memory at its highest point."""

    peak_bytes: int
    by_category: dict[Category, int]
    """Adds up to that."""
    place: str
    """Where it was."""
    rss_bytes: int | None = None
    """Resident bytes of the process at their highest, less those before it loaded anything; known at the end."""


def highest_memory(events: Iterable[Event]) -> HighestMemory | None:
    """The highest memory that a run's events tell of by category; None where nothing was measured."""
    highest: HighestMemory | None = None
    for event in events:
        found = None
        if isinstance(event, MemoryMeasured) and event.by_category:
            found = HighestMemory(event.peak_bytes, event.by_category, event.place)
        elif isinstance(event, Finished) and event.measured_by_category:
            found = HighestMemory(
                event.measured_peak_bytes, event.measured_by_category, event.measured_place, event.rss_peak_bytes
            )
        if found is not None and (highest is None or found.peak_bytes >= highest.peak_bytes):
            highest = found
    return highest


def look(run: RunFolder) -> tuple[Launched | None, bool]:
    """The latest launch and whether the lock is held, in the order in which no moment looks like a lost run.

    Events must be read after this: a worker that finishes between two looks has then already said so.
    """
    launched = read_launched(run.launched_file)
    return launched, is_locked(run)


def events_bytes(run: RunFolder) -> int:
    """Size of the event file; 0 where there is none."""
    try:
        return run.events_file.stat().st_size
    except OSError:
        return 0


def read_launched(path: Path) -> Launched | None:
    """launched.json; None when there is none, or nothing in it can be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Launched)
    except (OSError, msgspec.MsgspecError):
        return None


def read_state(run: RunFolder, steps: int = 0) -> RunState:
    """The state of a run from all of its events.

    Raises:
        DiskProblem: a file of the run may not be read.
    """
    return RunWatch(run, steps).poll()[1]


class RunSummary(msgspec.Struct, frozen=True):
    """One line of a list of runs."""

    id: str
    path: str
    adapter_name: str
    """Name in the library that it publishes to; empty when the plan cannot be read."""
    model: str
    """Base model; empty when the plan cannot be read."""
    made_at: float | None
    """When its plan was written, seconds since 1970."""
    state: RunState


class _SpecHead(msgspec.Struct, frozen=True):
    model: str


class _RecipeHead(msgspec.Struct, frozen=True):
    base: _SpecHead


class _RunSpecHead(msgspec.Struct, frozen=True):
    recipe: _RecipeHead


class _PlanHead(msgspec.Struct, frozen=True):
    """The part of plan.json that a list shows; the rest may be of another version."""

    spec: _RunSpecHead
    steps: int
    adapter_name: str = ""


def summarise_run(run: RunFolder, tail_bytes: int = 1 << 14) -> RunSummary:
    """A run as a list shows it, from the head of its plan and the tail of its events; a damaged one says why."""
    try:
        made_at: float | None = run.plan_file.stat().st_mtime
        plan = msgspec.json.decode(run.plan_file.read_bytes(), type=_PlanHead)
    except FileNotFoundError:
        return _damaged(run, None, "plan.json is missing")
    except OSError as error:
        return _damaged(run, None, f"plan.json cannot be read: {error.strerror}")
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        return _damaged(run, made_at, f"plan.json is damaged: {error}")
    try:
        size = events_bytes(run)
        state = _state_of_tail(run, plan.steps, tail_bytes)
        if state.status == "lost" and (is_locked(run) or events_bytes(run) != size):
            # As in `RunWatch.poll`.
            state = _state_of_tail(run, plan.steps, tail_bytes)
    except (EdgepeftError, OSError) as error:
        return _damaged(run, made_at, str(error))
    return RunSummary(run.id, os.fspath(run), plan.adapter_name, plan.spec.recipe.base.model, made_at, state)


def _state_of_tail(run: RunFolder, steps: int, tail_bytes: int) -> RunState:
    launched, lock_held = look(run)
    # Before they are read: what is counted has been seen.
    size = events_bytes(run)
    folded = RunFold(steps)
    for event in read_last_events(run.events_file, tail_bytes)[0]:
        folded.add(event)
    return folded.state(lock_held, launched=launched, events_bytes=size)


def _damaged(run: RunFolder, made_at: float | None, why: str) -> RunSummary:
    return RunSummary(run.id, os.fspath(run), "", "", made_at, RunState(status="damaged", message=why))


def summarise_runs() -> list[RunSummary]:
    """Every run, the newest first."""
    return [summarise_run(run) for run in list_runs()]


def _larger(first: int | None, second: int | None) -> int | None:
    return second if first is None else first if second is None else max(first, second)
