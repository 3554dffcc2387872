"""Plans whose training step was simulated: by request, where the closed form does not know the architecture, and where
a refusal hangs on less than the closed form may be off.

A dry run of one candidate puts a factor on the closed form of all with the same checkpointing; the search then runs
again, until the dry run of what it chooses stays within the budget.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from edgepeft.errors import BadInput, DeviceUnusable, DoesNotFit, EdgepeftError
from edgepeft.memory.assembly import is_exact
from edgepeft.memory.breakdown import Breakdown
from edgepeft.memory.calibration import base_bytes_of, corrected
from edgepeft.memory.dry_run import DryRun, DryRunRequest
from edgepeft.plan.request import Candidate, PlanRequest
from edgepeft.plan.search import SCALAR_BYTES, Search, describe_plan, make_plan
from edgepeft.plan.train_plan import TrainPlan
from edgepeft.plan.verify import CannotSimulateError
from edgepeft.spec import Checkpointing
from edgepeft.units import format_bytes

Simulate = Callable[[DryRunRequest], DryRun]
NEAR_MISS = 1.06
"""A refusal whose smallest plan needs up to this many budgets is looked at by a dry run."""
UNSURE = 0.3
"""Share by which the closed form may be off for layers that it does not know."""
MOST_ROUNDS = 5
"""Searches that are made at the most."""
CLOSER = 1.002
"""Put on a factor that a second dry run of the same checkpointing shows to be too low."""


def plan_for(request: PlanRequest, simulate: Simulate | None, *, verify: bool = False) -> TrainPlan:
    """The best plan for a request.

    Args:
        request: what it is made from.
        simulate: makes dry runs; without it the closed form decides alone.
        verify: simulate the plan in any case.

    Raises:
        UsageError: an option cannot be meant, or does not suit the model.
        BadInput: a length limit leaves no sample, or the model cannot be simulated.
        DoesNotFit: no plan fits.
    """
    if simulate is None:
        return make_plan(request)
    if verify:
        return simulated_plan(request, simulate)
    if not is_exact(request.entry.shape):
        try:
            return simulated_plan(request, simulate)
        except (CannotSimulateError, DeviceUnusable) as error:
            return make_plan(_unsure(request, error))
    try:
        plan = make_plan(request)
    except DoesNotFit as refused:
        search = Search(request)
        smallest = search.smallest(search.least_length())
        if search.count(smallest).memory.peak_bytes > NEAR_MISS * request.budget_bytes:
            raise
        try:
            return simulated_plan(request, simulate)
        except (CannotSimulateError, DeviceUnusable):
            # Nobody asked for a dry run: where none can be made, the refusal stands as it is.
            raise refused from None
    if not needs_dry_run(request, plan):
        return plan
    try:
        return simulated_plan(request, simulate)
    except (CannotSimulateError, DeviceUnusable):
        return plan


def needs_dry_run(request: PlanRequest, plan: TrainPlan) -> bool:
    """Whether a plan of the closed form alone is not to be relied on: it fits only if that is not off at all, or that
    does not know the model's layers."""
    sure = plan.memory.peak_bytes * (1 + plan.memory.uncertainty) <= request.budget_bytes
    return not (sure and is_exact(request.entry.shape))


def _unsure(request: PlanRequest, error: EdgepeftError) -> PlanRequest:
    note = (
        f"{request.entry.shape.architecture} has no closed form, and its step could not be simulated ({error.what}): "
        "its memory is that of a Llama of the same sizes, and may be far off."
    )
    return msgspec.structs.replace(request, uncertainty=UNSURE, notes=(*request.notes, note))


def simulated_plan(request: PlanRequest, simulate: Simulate) -> TrainPlan:
    """The best plan whose dry run stays within the budget.

    Raises:
        DoesNotFit: there is none.
        EdgepeftError: as `plan_for`, or a dry run failed.
    """
    rounds = _Rounds(request, simulate)
    if not is_exact(request.entry.shape):
        rounds.learn()
    for _ in range(MOST_ROUNDS):
        plan = rounds.next()
        if plan is not None:
            return plan
    raise DoesNotFit(
        f"no plan was found whose dry run stays within the budget of {format_bytes(request.budget_bytes)}",
        where="--verify",
        hint="Give a larger budget, or a smaller --max-seq-len or --micro-batch-tokens",
    )


class _Rounds:
    """Searches with what the dry runs before them taught."""

    def __init__(self, request: PlanRequest, simulate: Simulate) -> None:
        self._request = request
        self._simulate = simulate
        self._config = request.config if request.config is not None else read_config(Path(request.entry.folder))
        self._factors: dict[Checkpointing, float] = dict(request.factors)
        self._told: list[str] = []

    def learn(self) -> None:
        """Simulates one candidate for each checkpointing that may be chosen."""
        search = self._search()
        for mode in (search.pins["checkpointing"],) if "checkpointing" in search.pins else ("layer", "none"):
            lean = search.leanest(search.least_length(), search.precisions[-1], search.ranks[-1])
            self._compare(search, msgspec.structs.replace(lean, checkpointing=mode))

    def next(self) -> TrainPlan | None:
        """A plan that keeps its budget; None when another search is needed.

        Raises:
            DoesNotFit: a dry run has confirmed it.
        """
        search = self._search()
        try:
            chosen = search.choose()
        except DoesNotFit:
            smallest = search.smallest(search.least_length())
            near = search.count(smallest).memory.peak_bytes <= NEAR_MISS * self._request.budget_bytes
            if not near or self._compare(search, smallest) >= 1:
                raise
            return None
        plan = describe_plan(search, chosen)
        found = self._dry_run(search, chosen)
        memory = self._expected(search, found)
        if memory.peak_bytes + SCALAR_BYTES > self._request.budget_bytes:
            self._told = [
                f"Planned again: a first choice would have held {format_bytes(memory.peak_bytes)} in the dry run."
            ]
            self._compare(search, chosen)
            return None
        notes = (*plan.notes, *self._told)
        if not is_exact(search.shape):
            notes = (*notes, f"{search.shape.architecture} has no closed form: its memory is that of a dry run.")
            plan = msgspec.structs.replace(plan, memory=memory)
        return msgspec.structs.replace(plan, dry_run=found, notes=notes)

    def _search(self) -> Search:
        return Search(msgspec.structs.replace(self._request, factors=dict(self._factors)))

    def _dry_run(self, search: Search, candidate: Candidate) -> DryRun:
        workload = search.count(candidate).workload
        spec, target = search.spec(candidate), self._request.device.target
        return self._simulate(DryRunRequest(spec, self._config, workload, target))

    def _expected(self, search: Search, found: DryRun) -> Breakdown:
        """What a dry run lets expect of the real run, after what earlier runs taught."""
        learnt = search.correction
        if learnt is not None and learnt.factor < 1 and is_exact(search.shape):
            # What the closed form says too much, a dry run does not.
            learnt = None
        return corrected(found.memory, learnt)

    def _compare(self, search: Search, candidate: Candidate) -> float:
        """Simulates a candidate and puts what it needs on the closed form; returns dry run ÷ prediction."""
        predicted = search.count(candidate).memory
        ratio = beyond_base(self._expected(search, self._dry_run(search, candidate)), predicted)
        before = self._factors.get(candidate.checkpointing)
        # The second correction of a factor is for another size of step: a little more settles it.
        self._factors[candidate.checkpointing] = ratio if before is None else before * ratio * CLOSER
        return ratio


def beyond_base(found: Breakdown, predicted: Breakdown) -> float:
    """The peak of `found` over that of `predicted`, both without the frozen base of the prediction."""
    base = base_bytes_of(predicted.peak)
    return max(0.1, (found.peak_bytes - base) / max(1, predicted.peak_bytes - base))


def read_config(folder: Path) -> dict[str, Any]:
    """A model's config.json.

    Raises:
        BadInput: it cannot be read.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(
            f"the model's config cannot be read: {error}", where=str(path), hint="Add the model again"
        ) from error
    if not isinstance(config, dict):
        raise BadInput("the model's config is not an object", where=str(path), hint="Add the model again")
    return config
