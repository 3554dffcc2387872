"""The search for the best run that fits a budget.

Quality comes first, in this order: samples kept whole, precision of the base, rank. Each is settled with the leanest
layout that executes it; the memory that is left then buys speed, cheapest means first: smaller pieces of the loss,
smaller micro-batches, checkpointing. Offloaded inputs are for cards on which nothing else fits. What the user typed is
kept as it is.

Candidates are judged by a bound on their micro-batches; where that lies a little above the budget, and for the plan
itself, the micro-batches that the run really makes are counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import msgspec

from edgepeft.memory.breakdown import Breakdown
from edgepeft.memory.calibration import Correction
from edgepeft.memory.chunks import in_token_steps
from edgepeft.memory.weights import ELEMENT_BYTES
from edgepeft.memory.workload import Workload, full_workload
from edgepeft.plan.prediction import Prediction, correction_for, predict
from edgepeft.plan.request import Candidate, Given, PlanRequest
from edgepeft.plan.space import Space
from edgepeft.plan.speed import SATURATION, RunTime, relative_speed, time_run
from edgepeft.plan.train_plan import TrainPlan
from edgepeft.spec import Checkpointing, Precision, RunSpec

__all__ = ["Candidate", "Given", "PlanRequest", "Search", "make_plan"]

LOSS_CHUNKS = (256, 128, 64)
"""Rows of logits at one time, fastest first; smaller ones save memory under a large vocabulary."""
LENGTH_STEP = 16
"""A length that memory limits is a multiple of this."""
MICRO_BATCH_STEPS = 16
"""Sizes of micro-batches that are tried from some tokens to twice as many."""
SCALAR_BYTES = 1024
"""Room for what is too small for the ledger: sums, counters, the states of generators."""
NEAR_BUDGET = ((1_000, math.inf), (20_000, 2.0), (math.inf, 1.15))
"""For runs of up to so many samples, all steps together: the bound, in budgets, up to which micro-batches are counted
instead; in long runs that takes a fraction of a second."""

LARGER_LOOKS = 8
"""Larger micro-batches that are looked at when the search by halves has ended."""


class Search(Space):
    """One search; afterwards it knows what the chosen values were weighed against."""

    def __init__(self, request: PlanRequest) -> None:
        super().__init__(request)
        self.correction = correction_for(request.device, self.shape)
        self.careful = True
        """Whether a plan leaves room for the prediction's uncertainty; given up when nothing fits otherwise."""
        self._predictions: dict[Candidate, Prediction] = {}
        self._counted: set[Candidate] = set()

    # What a candidate costs --------------------------------------------------------------------------------------

    def cost(self, candidate: Candidate) -> Breakdown:
        """What a candidate needs at the most; what it needs, once `count` has looked at its micro-batches."""
        return self.prediction(candidate).memory

    def prediction(self, candidate: Candidate) -> Prediction:
        """`cost` with the workload that decides it."""
        if candidate not in self._predictions:
            lengths = self.request.lengths
            if lengths is None:
                longest = self.longest_sample(candidate.max_seq_len)
                workload = full_workload(candidate.micro_batch_tokens, longest)
            else:
                workload = lengths.bound(self.spec(candidate))
            self._predictions[candidate] = self._predict(candidate, (workload,))
        return self._predictions[candidate]

    def count(self, candidate: Candidate) -> Prediction:
        """What a candidate needs for the micro-batches that its run really makes."""
        lengths = self.request.lengths
        if lengths is not None and candidate not in self._counted:
            self._counted.add(candidate)
            self._predictions[candidate] = self._predict(candidate, lengths.exact(self.spec(candidate)))
        return self.prediction(candidate)

    def _predict(self, candidate: Candidate, workloads: tuple[Workload, ...]) -> Prediction:
        found = self.correction
        factors = self.request.factors
        mode: Checkpointing = candidate.checkpointing
        if mode == "offload" and mode not in factors:
            # Never simulated: it is most like the same layers with their inputs on the card.
            mode = "layer"
        factor = factors.get(mode)
        if factor is not None:
            found = Correction(factor * (found.factor if found else 1.0), found.runs if found else 0)
        prediction = predict(self.spec(candidate), self.shape, workloads, self.request.device.target, found)
        if (uncertainty := self.request.uncertainty) is None:
            return prediction
        memory = msgspec.structs.replace(prediction.memory, uncertainty=uncertainty)
        return msgspec.structs.replace(prediction, memory=memory)

    def fits(self, candidate: Candidate) -> bool:
        """Whether its predicted peak is within the budget, with room for the prediction's uncertainty, and what it
        offloads within the RAM."""
        if candidate.checkpointing == "offload" and not self._ram_holds(candidate):
            return False
        budget = self.request.budget_bytes
        needed = self._needed(self.prediction(candidate))
        if budget < needed <= self._near * budget:
            needed = self._needed(self.count(candidate))
        return needed <= budget

    @cached_property
    def _near(self) -> float:
        lengths = self.request.lengths
        lean = self._lean(self.least_length(), self.precisions[-1], self.ranks[-1])
        run = None if lengths is None else lengths.steps(self.spec(lean).recipe)
        samples = math.inf if run is None else run.steps * run.samples_per_step
        return next(near for most, near in NEAR_BUDGET if samples <= most)

    def _needed(self, prediction: Prediction) -> int:
        return prediction.safe_bytes if self.careful else prediction.memory.peak_bytes + SCALAR_BYTES

    @property
    def leanest_of_all(self) -> Candidate:
        """The smallest plan that the search may come to."""
        return self.leanest(self.least_length(), self.precisions[-1], self.ranks[-1])

    def leanest(self, max_seq_len: int, precision: Precision, rank: int) -> Candidate:
        """The layout that executes these with the least memory; inputs are offloaded only where they have to be."""
        lean = self._lean(max_seq_len, precision, rank)
        if not self._may_offload or self.fits(lean):
            return lean
        return msgspec.structs.replace(lean, checkpointing="offload")

    @property
    def _may_offload(self) -> bool:
        on_card = self.request.device.kind == "cuda" and "checkpointing" not in self.pins
        return on_card and self._ram_holds(self._lean(self.least_length(), self.precisions[-1], self.ranks[-1]))

    def _ram_holds(self, candidate: Candidate) -> bool:
        """Whether the inputs of all layers would find room in the RAM beside the card; whoever pins that decides."""
        free = self.request.device.ram_free_bytes
        if free is None or "checkpointing" in self.pins:
            return True
        tokens = max(candidate.micro_batch_tokens, self.longest_sample(candidate.max_seq_len))
        return self.offloaded_bytes(tokens) <= free

    def offloaded_bytes(self, tokens: int) -> int:
        """What lies in RAM between forward and backward of a micro-batch: the inputs of all layers."""
        return ELEMENT_BYTES[self.compute_dtype] * self.shape.layers * self.shape.hidden * in_token_steps(tokens)

    def _lean(self, max_seq_len: int, precision: Precision, rank: int) -> Candidate:
        return Candidate(
            max_seq_len=max_seq_len,
            precision=precision,
            rank=rank,
            micro_batch_tokens=self.pins.get("micro_batch_tokens", self.longest_sample(max_seq_len)),
            checkpointing=self.pins.get("checkpointing", "layer"),
            loss_chunk_tokens=self.pins.get("loss_chunk_tokens", LOSS_CHUNKS[-1]),
        )

    # The search --------------------------------------------------------------------------------------------------

    def choose(self) -> Candidate:
        """The best candidate that fits.

        Raises:
            DoesNotFit: none does.
        """
        found = self.find()
        if found is None:
            from edgepeft.plan.refusal import NothingFits

            raise NothingFits(self)
        return found

    def find(self) -> Candidate | None:
        """The best candidate that fits; None when none does."""
        length = self._longest_affordable()
        if length is None:
            self.careful = False
            length = self._longest_affordable()
        if length is None:
            return None
        least_rank = self.ranks[-1]
        precision = next(p for p in self.precisions if self.fits(self.leanest(length, p, least_rank)))
        rank = next(r for r in self.ranks if self.fits(self.leanest(length, precision, r)))
        return self.fastest(length, precision, rank)

    def smallest(self, max_seq_len: int) -> Candidate:
        """The candidate that needs least at a length."""
        return min(
            (self.leanest(max_seq_len, precision, self.ranks[-1]) for precision in self.precisions),
            key=lambda candidate: self.cost(candidate).peak_bytes,
        )

    def least_length(self) -> int:
        """The shortest limit that a plan may go down to."""
        target: int = self.target_length()
        return target if "max_seq_len" in self.pins else min(target, self.request.preset.min_seq_len.value)

    def _longest_affordable(self) -> int | None:
        target, least = self.target_length(), self.least_length()
        if self._affords(target):
            return target
        if least == target or not self._affords(least):
            return None
        tried: list[int] = [*range(least, target, LENGTH_STEP), target]
        low, high = 0, len(tried) - 1  # the first fits, the last does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(self.smallest(tried[middle])) else (low, middle)
        return tried[low]

    def _affords(self, length: int) -> bool:
        """Whether the smallest plan of a length fits, by its own micro-batches and not by a bound on them."""
        smallest = self.smallest(length)
        self.count(smallest)
        return self.fits(smallest)

    def fastest(self, length: int, precision: Precision, rank: int) -> Candidate:
        """The fastest layout of these that fits; the leanest when none does."""
        lean = self.leanest(length, precision, rank)
        return max(
            self._layouts(lean), key=lambda found: (self.speed(found), -self.cost(found).peak_bytes), default=lean
        )

    def _layouts(self, lean: Candidate) -> Iterator[Candidate]:
        """For each checkpointing and each chunk the largest micro-batch that fits."""
        sizes, fastest = self.micro_batches(lean), 0.0
        for mode, chunk in self._modes_and_chunks(offload=self._may_offload):
            if mode == "offload" and fastest and self._may_offload:
                break
            layout = msgspec.structs.replace(lean, checkpointing=mode, loss_chunk_tokens=chunk)
            if self.speed(msgspec.structs.replace(layout, micro_batch_tokens=sizes[-1])) <= fastest:
                # Not even its largest micro-batch would be faster than what fits already.
                continue
            found = self._largest_fitting(layout, sizes)
            if found is not None:
                fastest = max(fastest, self.speed(found))
                yield found

    def _modes_and_chunks(self, *, offload: bool) -> Iterator[tuple[Checkpointing, int]]:
        modes: tuple[Checkpointing, ...] = ("none", "layer", "offload") if offload else ("none", "layer")
        for mode in (self.pins["checkpointing"],) if "checkpointing" in self.pins else modes:
            for chunk in (self.pins["loss_chunk_tokens"],) if "loss_chunk_tokens" in self.pins else LOSS_CHUNKS:
                yield mode, chunk

    def _largest_fitting(self, layout: Candidate, sizes: list[int]) -> Candidate | None:
        tried = [msgspec.structs.replace(layout, micro_batch_tokens=tokens) for tokens in sizes]
        # The last one may be a whole step, which needs less than a part of it that others follow.
        if self.fits(tried[-1]):
            return tried[-1]
        low, high = -1, len(tried) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(tried[middle]) else (low, middle)
        if self._near == math.inf:
            # In a run of few samples a larger one may pack a whole step, which needs less, or fill rows up by less.
            larger = tried[high + 1 :]
            larger = larger[:: max(1, len(larger) // LARGER_LOOKS)]
            return next((found for found in reversed(larger) if self.fits(found)), tried[low] if low >= 0 else None)
        return tried[low] if low >= 0 else None

    def micro_batches(self, lean: Candidate) -> list[int]:
        """The sizes to try, from the longest sample to what saturates the device or holds a whole step."""
        if "micro_batch_tokens" in self.pins:
            return [self.pins["micro_batch_tokens"]]
        tokens = lean.micro_batch_tokens
        most = SATURATION[self.request.device.kind][1]
        if self.request.lengths is not None:
            most = min(most, self.request.lengths.step_tokens(self.spec(lean).recipe))
        sizes = [tokens]
        while tokens < most:
            step = max(8, (1 << (tokens.bit_length() - 1)) // MICRO_BATCH_STEPS)
            tokens = min(most, (tokens // step + 1) * step)
            sizes.append(tokens)
        return sizes

    def speed(self, candidate: Candidate) -> float:
        """A relative speed, to rank layouts of one recipe."""
        tokens = max(candidate.micro_batch_tokens, self.longest_sample(candidate.max_seq_len))
        return relative_speed(self.request.device.kind, tokens, candidate.checkpointing, candidate.loss_chunk_tokens)

    def time(self, spec: RunSpec) -> RunTime | None:
        """How long a run takes; None without samples."""
        lengths, entry = self.request.lengths, self.request.entry
        if lengths is None:
            return None
        return time_run(spec, self.shape, self.request.device, lengths, entry)

    def wants_more(self, chosen: Candidate) -> dict[str, int]:
        """What more memory would make better than it is in a candidate, and from how many bytes on."""
        length, precision, rank = chosen.max_seq_len, chosen.precision, chosen.rank
        least: dict[str, list[Candidate]] = {
            "longer samples": [],
            "a more exact base": [],
            "a larger rank": [],
            "nothing computed twice": [],
            "inputs of layers kept on the card": [],
            "larger micro-batches": [],
            "larger pieces of the loss": [],
        }
        if length < self.target_length():
            least["longer samples"].append(self.smallest(min(self.target_length(), length + LENGTH_STEP)))
        if precision != self.precisions[0]:
            better = self.precisions[self.precisions.index(precision) - 1]
            least["a more exact base"].append(self.leanest(length, better, self.ranks[-1]))
        if rank != self.ranks[0]:
            least["a larger rank"].append(self.leanest(length, precision, self.ranks[self.ranks.index(rank) - 1]))
        for layout in self._faster(chosen):
            if layout.checkpointing != chosen.checkpointing:
                better_mode = layout.checkpointing == "none"
                what = "nothing computed twice" if better_mode else "inputs of layers kept on the card"
                least[what].append(layout)
            elif layout.loss_chunk_tokens == chosen.loss_chunk_tokens:
                least["larger micro-batches"].append(layout)
            elif layout.micro_batch_tokens == chosen.micro_batch_tokens:
                least["larger pieces of the loss"].append(layout)
        found = {
            what: min(self.prediction(candidate).safe_bytes for candidate in candidates)
            for what, candidates in least.items()
            if candidates
        }
        # Quality goes before speed: where more memory buys it, a faster layout is not what it brings.
        quality = [found[what] for what in ("longer samples", "a more exact base", "a larger rank") if what in found]
        return {
            what: from_bytes
            for what, from_bytes in found.items()
            if from_bytes in quality or from_bytes < min(quality, default=math.inf)
        }

    def _faster(self, chosen: Candidate) -> Iterator[Candidate]:
        """For each checkpointing and each chunk the smallest micro-batch that makes a layout faster than this one."""
        lean = self.leanest(chosen.max_seq_len, chosen.precision, chosen.rank)
        speed, sizes = self.speed(chosen), self.micro_batches(lean)
        for mode, chunk in self._modes_and_chunks(offload=chosen.checkpointing == "offload"):
            for tokens in sizes:
                layout = msgspec.structs.replace(
                    lean, checkpointing=mode, loss_chunk_tokens=chunk, micro_batch_tokens=tokens
                )
                if self.speed(layout) > speed:
                    yield layout
                    break


def make_plan(request: PlanRequest) -> TrainPlan:
    """The best plan for a request.

    Raises:
        UsageError: an option cannot be meant, or does not suit the model.
        BadInput: a length limit leaves no sample.
        DoesNotFit: no plan fits; the message says by how much and what would help.
    """
    search = Search(request)
    return describe_plan(search, search.choose())


def describe_plan(search: Search, chosen: Candidate, *, others: bool = True) -> TrainPlan:
    """The plan of a candidate: its steps, time and memory, what each choice was weighed against, and runner-ups.

    Args:
        search: the search that chose it.
        chosen: the values that memory decides.
        others: look for runner-ups, which takes longer than everything else.

    Raises:
        BadInput: its length limit leaves no sample.
        UsageError: as `decide_upkeep`.
    """
    from edgepeft.plan.reasons import check_samples_left, describe, notes_of, steps_of
    from edgepeft.plan.runner_ups import runner_ups
    from edgepeft.plan.unfreezing import check_unfreezing
    from edgepeft.plan.upkeep import decide_upkeep, time_note

    request, spec = search.request, search.spec(chosen)
    lengths = request.lengths
    data = None if lengths is None else lengths.summary(chosen.max_seq_len, spec.recipe.overlong)
    if data is not None:
        check_samples_left(data, spec.recipe)
    steps = 0 if data is None else steps_of(spec.recipe, data.train_samples)
    check_unfreezing(spec.recipe, search.shape, steps)
    spec = msgspec.structs.replace(spec, upkeep=decide_upkeep(search.pins, request.preset, data, steps))
    prediction = search.count(chosen)
    time = search.time(spec)
    note = time_note(spec.upkeep, time, steps)
    return TrainPlan(
        spec=spec,
        choices=describe(search, chosen, spec, data, time),
        memory=prediction.memory,
        steps=steps,
        data=data,
        operations=time.operations if time else 0.0,
        seconds=time.seconds if time else None,
        alternatives=runner_ups(search, chosen, spec, time) if others else (),
        notes=request.notes + notes_of(search, chosen, data) + ((note,) if note else ()),
        wants_more=search.wants_more(chosen),
        workload=prediction.workload,
    )
