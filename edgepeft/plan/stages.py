"""A plan as it comes about, for those who watch: the memory of a changed value at once, the plan after a moment, its
runner-ups and a dry run later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from edgepeft.errors import DoesNotFit
from edgepeft.memory.breakdown import Breakdown
from edgepeft.memory.workload import Workload
from edgepeft.plan.prediction import Prediction
from edgepeft.plan.request import Candidate, PlanRequest
from edgepeft.plan.search import Search, describe_plan
from edgepeft.plan.simulated import Simulate, needs_dry_run, plan_for
from edgepeft.plan.train_plan import TrainPlan
from edgepeft.spec import RunSpec

Stage = Literal["chosen", "compared", "settled"]
"""The plan without its runner-ups; with them; and as `plan_for` gives it."""


class Staged(NamedTuple):
    """A plan so far."""

    plan: TrainPlan
    stage: Stage


class _Watched(Search):
    """A search that may be given up between two candidates."""

    def __init__(self, request: PlanRequest, check: Callable[[], None]) -> None:
        super().__init__(request)
        self._check = check

    def _predict(self, candidate: Candidate, workloads: tuple[Workload, ...]) -> Prediction:
        self._check()
        return super()._predict(candidate, workloads)


def _go_on() -> None:
    """Nobody wants to give up."""


def plan_in_stages(
    request: PlanRequest, simulate: Simulate, *, verify: bool = False, check: Callable[[], None] = _go_on
) -> Iterator[Staged]:
    """Plans for a request, each better known than the one before; the last is `settled`, and that of `plan_for`.

    Args:
        request: what they are made from.
        simulate: makes dry runs, where the closed form is not enough.
        verify: simulate the plan in any case.
        check: called between candidates; what it raises ends the search.

    Raises:
        EdgepeftError: as `plan_for`.
    """
    search = _Watched(request, check)
    try:
        chosen = search.choose()
    except DoesNotFit:
        # Nothing fits by the closed form; a dry run may know better, and then there is only one stage.
        yield Staged(plan_for(request, simulate, verify=verify), "settled")
        return
    yield Staged(describe_plan(search, chosen, others=False), "chosen")
    plan = describe_plan(search, chosen)
    if not verify and not needs_dry_run(request, plan):
        yield Staged(plan, "settled")
        return
    yield Staged(plan, "compared")
    yield Staged(plan_for(request, simulate, verify=verify), "settled")


def glance(request: PlanRequest, like: RunSpec) -> Breakdown:
    """What a run would hold with what the request pins, and all else as in a plan that exists: no search, a few
    milliseconds. An upper bound on its micro-batches is counted, as the search does it.

    Args:
        request: with the changed value among its overrides.
        like: the run that is on the screen.

    Raises:
        UsageError: an option cannot be meant, or does not suit the model.
    """
    search = Search(request)
    pins, recipe, layout = search.pins, like.recipe, like.layout
    length = min(pins.get("max_seq_len", recipe.max_seq_len), search.target_length())
    candidate = Candidate(
        max_seq_len=length,
        precision=search.precisions[0] if recipe.precision not in search.precisions else recipe.precision,
        rank=_rank(search, getattr(recipe.method, "rank", 0)),
        micro_batch_tokens=pins.get("micro_batch_tokens", layout.micro_batch_tokens),
        checkpointing=pins.get("checkpointing", layout.checkpointing),
        loss_chunk_tokens=pins.get("loss_chunk_tokens", layout.loss_chunk_tokens),
    )
    return search.cost(candidate)


def _rank(search: Search, rank: int) -> int:
    """The rank of the run where it is possible; 0 for a method that has none."""
    return rank if search.ranks != (0,) and "rank" not in search.pins and rank else search.ranks[0]
