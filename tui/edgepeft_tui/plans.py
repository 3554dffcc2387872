"""What the Plan screen shows: plans made by the light rooms, turned into plain lines of data.

A `Planner` is asked from one thread at a time; it keeps what it has read, so that a changed value costs no reading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgepeft.errors import DoesNotFit, EdgepeftError
from edgepeft.memory.breakdown import Breakdown
from edgepeft_tui.choice_rows import ChoiceRow, choice_rows

if TYPE_CHECKING:
    from edgepeft.data.statistics import Bin
    from edgepeft.plan.request import PlanRequest
    from edgepeft.plan.sources import Sources
    from edgepeft.plan.train_plan import TrainPlan
    from edgepeft.plan.verify import Simulator
    from edgepeft.spec import RunSpec

Tell = Callable[[str, float | None], None]
"""Told what is being done and which share of it is done, if known."""

_GIVEN = ("gpu", "budget", "intent")
"""Options that are decided before a plan is searched."""


class Question(msgspec.Struct, frozen=True):
    """What is asked of the planner."""

    model: str = ""
    data: str | None = None
    values: dict[str, str] = {}
    """Only what the user set: option or setting of the method → text."""
    verify: bool = False


class OtherRow(msgspec.Struct, frozen=True):
    """A runner-up."""

    what: str
    cost: str
    """Its memory against the chosen plan's, or by how much it does not fit."""
    time: str
    fits: bool
    why: str
    changes: dict[str, str]


class PlanView(msgspec.Struct, frozen=True):
    """A plan as the screen shows it."""

    plan: TrainPlan
    rows: tuple[ChoiceRow, ...]
    others: tuple[OtherRow, ...]
    bins: tuple[Bin, ...]
    """Lengths of the samples."""
    settled: bool
    """Whether nothing about it is still being worked out."""

    @property
    def memory(self) -> Breakdown:
        """Its predicted memory."""
        return self.plan.memory


class Refusal(msgspec.Struct, frozen=True):
    """Why there is no plan."""

    text: str
    fits: bool = True
    """False where no plan fits the budget; True where something was wrong with what was asked."""
    memory: Breakdown | None = None
    """Of the smallest plan that was tried."""
    budget_bytes: int | None = None
    ways: tuple[str, ...] = ()
    """What would help."""


class Glance(msgspec.Struct, frozen=True):
    """What a value that is not taken yet would make of the memory."""

    memory: Breakdown | None = None
    budget_bytes: int | None = None
    wrong: str = ""
    """Why the value cannot be meant."""


class Superseded(Exception):
    """A newer question waits, so that the answer to this one is of no use."""


class Planner:
    """Answers questions; one thread may ask, and any may cancel."""

    def __init__(self) -> None:
        self._sources: Sources | None = None
        self._simulator: Simulator | None = None
        self._request: PlanRequest | None = None
        self._asked: Question | None = None

    def forget(self) -> None:
        """Looks at devices, models and data anew from the next question on."""
        self._sources = None

    def cancel(self) -> None:
        """Ends a dry run that is under way."""
        simulator = self._simulator
        if simulator is not None:
            simulator.cancel()

    def answer(self, question: Question, tell: Tell, stale: Callable[[], bool]) -> Iterator[PlanView | Refusal]:
        """The plan for a question, each time better known.

        Args:
            question: what is asked.
            tell: told what takes long.
            stale: whether a newer question waits.

        Raises:
            Superseded: a newer question waits.
            Interrupted: the dry run was cancelled.
        """

        def told(what: str, share: float | None) -> None:
            if stale():
                raise Superseded
            tell(what, share)

        try:
            yield from self._answer(question, told, stale)
        except DoesNotFit as error:
            yield from self._refuse(error)
        except EdgepeftError as error:
            if error.exit_code == error.exit_code.INTERRUPTED:
                raise
            yield Refusal(" ".join(str(error).split()))

    def _answer(self, question: Question, tell: Tell, stale: Callable[[], bool]) -> Iterator[PlanView | Refusal]:
        from edgepeft.plan.stages import plan_in_stages
        from edgepeft.plan.verify import Simulator

        def check() -> None:
            if stale():
                raise Superseded

        request = self._request_for(question, tell)
        self._request, self._asked = request, question
        bins = request.lengths.histogram() if request.lengths is not None else ()
        with Simulator(lambda what: tell(what, None)) as simulator:
            self._simulator = simulator
            try:
                stages = plan_in_stages(request, simulator.dry_run, verify=question.verify, check=check)
                for plan, stage in stages:
                    yield view_of(plan, question, bins, settled=stage == "settled")
                    check()
            finally:
                self._simulator = None

    def _refuse(self, error: DoesNotFit) -> Iterator[Refusal]:
        budget = self._request.budget_bytes if self._request is not None else None
        refusal = Refusal(f"{error.what}.", False, getattr(error, "memory", None), budget)
        yield refusal
        ways = getattr(error, "refusal", None)
        if ways is not None:
            yield msgspec.structs.replace(refusal, ways=tuple(way.text for way in ways.ways))
        elif error.hint:
            yield msgspec.structs.replace(refusal, ways=(error.hint,))

    def _request_for(self, question: Question, tell: Tell | None) -> PlanRequest:
        from edgepeft.plan.build import make_request
        from edgepeft.plan.options import typed_options
        from edgepeft.plan.sources import Sources

        if self._sources is None:
            self._sources = Sources()
        data = Path(question.data).expanduser() if question.data is not None else None
        typed = typed_options(question.values)
        return make_request(question.model, data, typed, progress=tell, sources=self._sources)

    def glance(self, question: Question, like: RunSpec) -> Glance:
        """What a changed value makes of the memory, in a few milliseconds; nothing where data would have to be read."""
        from edgepeft.plan.build import DATA_OPTIONS
        from edgepeft.plan.options import typed_options
        from edgepeft.plan.stages import glance

        before, asked = self._request, self._asked
        if before is None or asked is None:
            return Glance()
        try:
            typed, known = typed_options(question.values), typed_options(asked.values)
            if any(typed.get(name) != known.get(name) for name in ("from_", *DATA_OPTIONS)):
                return Glance()
            plain = {name: value for name, value in typed.items() if name not in _GIVEN + DATA_OPTIONS}
            if before.parent is not None or any(typed.get(name) != known.get(name) for name in _GIVEN):
                request = self._request_for(question, None)
            else:
                request = msgspec.structs.replace(before, overrides=plain)
            return Glance(glance(request, like), request.budget_bytes)
        except EdgepeftError as error:
            return Glance(wrong=" ".join(str(error).split()))


def view_of(plan: TrainPlan, question: Question, bins: tuple[Bin, ...], *, settled: bool) -> PlanView:
    """A plan as the screen shows it."""
    rows = choice_rows(plan, question.values)
    others = tuple(_other(plan, other) for other in plan.alternatives)
    return PlanView(plan, rows, others, bins, settled)


def _other(plan: TrainPlan, other: Any) -> OtherRow:
    from edgepeft.plan.speed import say_time
    from edgepeft.units import format_bytes

    difference = other.peak_bytes - plan.memory.peak_bytes
    budget = plan.spec.budget_bytes
    if budget is not None and other.peak_bytes > budget:
        cost = f"does not fit by {format_bytes(other.peak_bytes - budget)}"
    else:
        cost = f"{'+' if difference >= 0 else '-'}{format_bytes(abs(difference))}"
    time = say_time(other.seconds).removeprefix("about ") if other.seconds is not None else ""
    return OtherRow(other.what, cost, time, other.fits, other.why, other.changes)
