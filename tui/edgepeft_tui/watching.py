"""Reads one run again and again, in a thread, into what the Train screen shows."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from time import time as now

from edgepeft.errors import EdgepeftError
from edgepeft.runs.events import (
    CheckpointSaved,
    Event,
    Failed,
    Finished,
    OutOfMemoryHit,
    PhaseChanged,
    Recovered,
    SampleGenerated,
    Started,
    StepDone,
)
from edgepeft.runs.layout import RunFolder
from edgepeft.runs.rescue import ending_of, rescue
from edgepeft.runs.state import RunState, RunWatch
from edgepeft.runs.text import (
    PHASES,
    ending_facts,
    energy_text,
    peak_text,
    plain_line,
    recovery_sentence,
    rescued_text,
    sentence,
)
from edgepeft.settings import WORLD_CO2_GRAMS_PER_KWH, carbon_factor
from edgepeft_tui.run_view import LOG_LINES, SAMPLES, Curves, LogLine, RunView, Sample, Tone
from edgepeft_tui.series import Thinned

SILENT_STEPS = 10
"""A step that takes this many times the longest of the last ones is told as silence."""
SILENT_SECONDS = 60.0
"""The least silence that is told while it trains."""
SILENT_PHASE_SECONDS = 600.0
"""The same while it loads, evaluates or saves: nothing is known of how long that takes."""


class RunViewer:
    """Follows one run; every `look` reads what is new.

    Raises:
        BadInput: its plan cannot be read.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self._plan = run.read_plan()
        self._watch = RunWatch(run, self._plan.steps)
        self._folded = self._watch.folded
        self._log: deque[LogLine] = deque(maxlen=LOG_LINES)
        self._samples: deque[Sample] = deque(maxlen=SAMPLES)
        self._hit: OutOfMemoryHit | None = None
        self._phase = ""
        self._lived = False
        self._skipped = 0
        self._draw_again()

    def look(self) -> tuple[RunView, bool]:
        """The run now, and whether anything in it is new.

        Raises:
            DiskProblem: a file of the run may not be read.
        """
        events, state = self._watch.poll()
        new = bool(events)
        if self._watch.folded is not self._folded:
            # The file was cut or replaced: what was read before is void.
            self._folded = self._watch.folded
            self._log.clear()
            self._samples.clear()
            self._draw_again()
        elif any(isinstance(event, Started) for event in events):
            self._draw_again()
        else:
            self._draw(event for event in events if isinstance(event, StepDone))
        for event in events:
            self._tell(event, state)
        if state.skipped_lines > self._skipped:
            self._skipped = state.skipped_lines
            lines = "1 damaged line" if self._skipped == 1 else f"{self._skipped} damaged lines"
            self._say(state.updated_at, f"{lines} of events.jsonl skipped", "warning")
        rescued = self._rescue(state)
        self._lived = state.alive
        return self._view(state, rescued), new or bool(rescued)

    def _rescue(self, state: RunState) -> str:
        """Starts a worker again that was seen alive and then killed; once in a run's life, whoever follows it."""
        if state.alive or not self._lived:
            return ""
        ending = ending_of(self.run, state)
        try:
            if ending is None or not rescue(self.run, ending):
                return ""
        except EdgepeftError as error:
            self._say(now(), f"The worker was killed and does not start again: {error}", "bad")
            return ""
        told = rescued_text(state, ending, stop_with="s")
        self._say(now(), told, "warning")
        return told

    # Curves.

    def _draw_again(self) -> None:
        self._loss, self._rate, self._norm, self._live, self._peak = (Thinned() for _ in range(5))
        self._draw(self._folded.history)

    def _draw(self, steps: Iterable[StepDone]) -> None:
        for done in steps:
            self._loss.add(done.step, done.loss)
            self._rate.add(done.step, done.learning_rate)
            self._norm.add(done.step, done.grad_norm)
            self._live.add(done.step, done.live_bytes)
            self._peak.add(done.step, done.peak_bytes)

    # The log.

    def _say(self, at: float | None, text: str, tone: Tone = "plain") -> None:
        self._log.append(LogLine(now() if at is None else at, text, tone))

    def _tell(self, event: Event, state: RunState) -> None:
        match event:
            case SampleGenerated():
                self._samples.append(Sample(event.step, event.prompt, event.answer))
            case OutOfMemoryHit():
                self._hit = event
                self._say(event.time, (sentence(event) or ("",))[0], "warning")
            case Recovered() if self._hit is not None:
                # One sentence instead of two, where the first was.
                if self._log and self._log[-1].tone == "warning":
                    self._log.pop()
                self._say(event.time, recovery_sentence(self._hit, event), "warning")
                self._hit = None
            case PhaseChanged():
                if event.name != self._phase and event.name not in ("evaluate", "train"):
                    self._say(event.time, PHASES[event.name] + (f": {event.detail}" if event.detail else ""))
                self._phase = event.name
            case CheckpointSaved():
                self._say(event.time, plain_line(event, state, 0) or "")
            case Finished():
                done = "Stopped and saved" if event.stopped else "Finished"
                self._say(event.time, f"{done} after step {event.step:,} {event.published}".rstrip(), "good")
            case Failed():
                self._say(event.time, f"Failed: {event.message}", "bad")
            case _:
                if found := sentence(event):
                    self._say(event.time, found[0], "warning" if found[1] == "yellow" else "plain")

    # The whole.

    def _view(self, state: RunState, rescued: str) -> RunView:
        last = self._folded.history[-1] if self._folded.history else None
        evaluations = [found for found in self._folded.evaluations if found.step or not last]
        ending = self._folded.ending
        outcome: tuple[str, ...] = ()
        grams, factor = None, None
        if isinstance(ending, Finished) and not state.alive:
            facts = ending_facts(ending)
            outcome = (
                peak_text(ending.measured_peak_bytes, ending.predicted_peak_bytes),
                *(f"{label.lower()} {text}" for label, text in facts.items()),
                f"energy {energy_text(ending)}",
            )
            grams, factor = ending.co2_grams, ending.co2_grams_per_kwh
        elif state.energy_wh is not None:
            factor = _carbon_factor()
            grams = state.energy_wh / 1000 * factor
        return RunView(
            id=self.run.id,
            state=state,
            model=self._plan.spec.recipe.base.model,
            adapter=self._adapter(state),
            predicted_bytes=self._plan.memory.peak_bytes,
            budget_bytes=self._plan.spec.budget_bytes,
            curves=Curves(
                loss=self._loss.curve(),
                held_out=Thinned((found.step, found.loss) for found in evaluations).curve(),
                rate=self._rate.curve(),
                norm=self._norm.curve(),
                live_bytes=self._live.curve(),
                peak_bytes=self._peak.curve(),
            ),
            learning_rate=last.learning_rate if last else None,
            grad_norm=last.grad_norm if last else None,
            log=tuple(self._log),
            samples=tuple(self._samples),
            outcome=outcome,
            co2_grams=grams,
            co2_grams_per_kwh=factor,
            silent_seconds=self._silence(state),
            rescued=rescued,
        )

    def _adapter(self, state: RunState) -> str:
        if state.published:
            return state.published
        saved = self.run.adapter
        return str(saved) if not state.alive and (saved / "adapter_config.json").is_file() else ""

    def _silence(self, state: RunState) -> float | None:
        if state.status != "running" or state.updated_at is None:
            return None
        limit = SILENT_PHASE_SECONDS
        if state.phase == "train" and self._folded.history:
            limit = max(SILENT_SECONDS, SILENT_STEPS * max(done.seconds for done in self._folded.history[-20:]))
        silent = now() - state.updated_at
        return silent if silent > limit else None


def _carbon_factor() -> float:
    try:
        return carbon_factor()
    except EdgepeftError:
        return WORLD_CO2_GRAMS_PER_KWH
