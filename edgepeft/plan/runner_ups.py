"""Real alternatives to a plan: what each would cost in memory and time, and why it was not chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from edgepeft.errors import UsageError
from edgepeft.methods import FullConfig, method_of
from edgepeft.plan.prediction import predict
from edgepeft.plan.request import Candidate
from edgepeft.plan.speed import RunTime
from edgepeft.plan.train_plan import Alternative
from edgepeft.spec import Checkpointing, RunSpec
from edgepeft.units import format_bytes

if TYPE_CHECKING:
    from edgepeft.plan.search import Search

MOST = 6
"""Alternatives that are shown."""
FULL = "full"
FULL_SHARE = 0.7
"""Part of the budget up to which full fine-tuning fits easily."""
MODES: dict[Checkpointing, str] = {
    "layer": "checkpointing",
    "none": "no checkpointing",
    "offload": "checkpointing offload",
}
"""How a layout is told from one with another checkpointing."""


def runner_ups(search: Search, chosen: Candidate, spec: RunSpec, time: RunTime | None) -> tuple[Alternative, ...]:
    """Neighbours of a chosen candidate, the better ones first.

    Args:
        search: the search that chose it.
        chosen: the values that memory decides.
        spec: its run.
        time: how long that takes.
    """
    collected = _Collected(search, chosen, spec, time)
    length, precision, rank = chosen.max_seq_len, chosen.precision, chosen.rank
    place = search.precisions.index(precision)
    if length < (target := search.target_length()):
        collected.add(
            f"max-seq-len {target:,}", search.fastest(target, precision, rank), "would keep more samples whole"
        )
    if place > 0:
        better = search.precisions[place - 1]
        # Only another rank or layout than the chosen one can make it fit.
        collected.add(
            f"precision {better}",
            search.fastest(length, better, search.ranks[-1]),
            "only with a smaller rank" if rank else "only in a leaner layout",
        )
    if rank and "rank" not in search.pins:
        larger = search.ranks[search.ranks.index(rank) - 1] if rank != search.ranks[0] else 2 * rank
        if rank_possible(search, larger):
            same = msgspec.structs.replace(chosen, rank=larger)
            brings = (
                f"fits too; the preset asks for {rank}" if rank == search.ranks[0] else "fits, with a slower layout"
            )
            collected.add(
                f"rank {larger}", same if search.fits(same) else search.fastest(length, precision, larger), brings
            )
    if chosen.checkpointing == "offload":
        kept = msgspec.structs.replace(chosen, checkpointing="layer")
        collected.add("checkpointing layer", kept, "fits too, and is faster")
    elif chosen.checkpointing == "layer":
        collected.add("no checkpointing", _other_mode(search, chosen), "fits, in micro-batches too small to be faster")
    else:
        collected.add("checkpointing", msgspec.structs.replace(chosen, checkpointing="layer"), "less memory, slower")
    if place + 1 < len(search.precisions):
        lower = search.precisions[place + 1]
        collected.add(
            f"precision {lower}", msgspec.structs.replace(chosen, precision=lower), "less memory, less exact base"
        )
    sizes = search.micro_batches(search.leanest(length, precision, rank))
    if chosen.micro_batch_tokens < sizes[-1]:
        larger_batch = msgspec.structs.replace(chosen, micro_batch_tokens=sizes[-1])
        collected.add(f"micro-batch-tokens {sizes[-1]:,}", larger_batch, "fits, but is no faster")
    elif sizes[0] < sizes[-1]:
        smallest = msgspec.structs.replace(chosen, micro_batch_tokens=sizes[0])
        # Where gradients are large, a step that adds them up needs more than one that makes them at once.
        if search.count(smallest).memory.peak_bytes < search.count(chosen).memory.peak_bytes:
            collected.add(f"micro-batch-tokens {sizes[0]:,}", smallest, "less memory, a less busy device")
    del collected.found[MOST - 1 :]
    collected.add_full()
    return tuple(collected.found)


def rank_possible(search: Search, rank: int) -> bool:
    """Whether every targeted matrix has room for an update of that rank."""
    config = search.method(search.ranks[-1])
    targeted = method_of(config).targeted(config, search.shape)
    return rank <= min(min(linear.in_features, linear.out_features) for linear in targeted)


def _other_mode(search: Search, chosen: Candidate) -> Candidate:
    """The chosen candidate without checkpointing: in its own micro-batches, or in the smallest where those exceed."""
    same = msgspec.structs.replace(chosen, checkpointing="none")
    if search.fits(same):
        return same
    lean = search.leanest(chosen.max_seq_len, chosen.precision, chosen.rank)
    return msgspec.structs.replace(lean, checkpointing="none")


class _Collected:
    """The alternatives so far."""

    def __init__(self, search: Search, chosen: Candidate, spec: RunSpec, time: RunTime | None) -> None:
        self.found: list[Alternative] = []
        self._search = search
        self._upkeep = spec.upkeep
        self._timed = time is not None and time.seconds is not None
        self._chosen = chosen
        self._seen = {chosen}

    def add_full(self) -> None:
        """Adds the training of every weight, where that would take no more than a part of the budget."""
        search = self._search
        if (
            search.request.parent is not None
            or search.method_id == FULL
            or search.request.entry.stored_as in ("bnb-4bit", "bnb-8bit")
        ):
            return
        spec = search.spec(self._chosen)
        recipe = msgspec.structs.replace(spec.recipe, method=FullConfig(), precision=search.compute_dtype)
        layout = msgspec.structs.replace(spec.layout, checkpointing="layer")
        spec = msgspec.structs.replace(spec, recipe=recipe, layout=layout, upkeep=self._upkeep)
        lengths = search.request.lengths
        workloads = (search.count(self._chosen).workload,) if lengths is None else lengths.exact(spec)
        try:
            peak = predict(spec, search.shape, workloads, search.request.device.target, None).memory.peak_bytes
        except UsageError:
            # Such as a mixture of experts.
            return
        if peak <= FULL_SHARE * search.request.budget_bytes:
            why = f"would fit easily and change every weight: --method {FULL}"
            self.found.append(Alternative("full fine-tuning", peak, True, why, self._seconds(spec), {"method": FULL}))

    def add(self, what: str, candidate: Candidate, brings: str) -> None:
        """Adds a candidate with what it needs; `brings` is told where it would fit."""
        if candidate in self._seen:
            return
        self._seen.add(candidate)
        search, chosen = self._search, self._chosen
        if candidate.checkpointing != chosen.checkpointing and "checkpointing" not in what:
            what += f", {MODES[candidate.checkpointing]}"
        peak = search.count(candidate).memory.peak_bytes
        over = peak - search.request.budget_bytes
        if over > 0:
            why = f"{format_bytes(over)} too much"
        elif not search.fits(candidate):
            why = "too near to the budget to be sure"
        else:
            why = brings
        spec = msgspec.structs.replace(search.spec(candidate), upkeep=self._upkeep)
        self.found.append(Alternative(what, peak, over <= 0, why, self._seconds(spec), _changes(chosen, candidate)))

    def _seconds(self, spec: RunSpec) -> float | None:
        time = self._search.time(spec) if self._timed else None
        return time.seconds if time is not None else None


def _changes(chosen: Candidate, other: Candidate) -> dict[str, str]:
    """What would have to be typed to get the other one."""
    names = [name for name in Candidate.__struct_fields__ if getattr(other, name) != getattr(chosen, name)]
    if "precision" in names or "checkpointing" in names:
        # A search would fill the memory that these free with a larger micro-batch.
        names += [name for name in ("micro_batch_tokens", "loss_chunk_tokens") if name not in names]
    return {name.replace("_", "-"): str(getattr(other, name)) for name in names}
