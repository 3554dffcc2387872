"""The search for the best run that fits a budget.

Quality comes first, in this order: samples kept whole, precision of the base, rank. Each is settled with the leanest
layout that executes it; the memory that is left then buys speed. What the user typed is kept as it is.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, cast

import msgspec

from edgepeft.errors import DoesNotFit, UsageError
from edgepeft.memory.breakdown import Breakdown
from edgepeft.memory.estimate import estimate_training
from edgepeft.methods import LoraConfig, method_of
from edgepeft.plan.device import PlanDevice
from edgepeft.plan.lengths import SampleLengths
from edgepeft.plan.pins import Pins, check_pins
from edgepeft.plan.train_plan import Alternative, Origin, TrainPlan
from edgepeft.profiles import Preset
from edgepeft.spec import (
    BaseRef,
    Checkpointing,
    ComputeDtype,
    DataRef,
    Layout,
    Optimizer,
    Precision,
    Recipe,
    RunSpec,
    Schedule,
    Upkeep,
)
from edgepeft.units import format_bytes

if TYPE_CHECKING:
    from edgepeft.models.store import ModelEntry

LOSS_CHUNKS = (256, 128, 64)
"""Rows of logits at one time, fastest first; smaller ones save memory under a large vocabulary."""
LENGTH_STEP = 64
"""A length that memory limits is a multiple of this."""
RECOMPUTE_SPEED = 2 / 3
"""Speed with checkpointing, as a share: beside one forward and one backward, of equal cost under frozen weights, every
layer runs forward once more."""
SATURATION: dict[Literal["cpu", "cuda"], tuple[int, int]] = {"cpu": (64, 2048), "cuda": (512, 8192)}
"""Tokens of a micro-batch at which a device reaches half of its speed, and above which more bring nothing. Rules of
thumb: `doctor --measure` does not exist for them yet."""
WIDTH_OF_PRESET_RATE = 4096
RATE_EXPONENT = 0.82
"""The learning rate goes as width^-0.82: through 2e-4 at 4,096 (QLoRA's rate for Llama-7B, arXiv 2305.14314, which
lowers it to 1e-4 from 6,656 on) and 1e-3 at 576, found by trial on the embedded model."""
LARGEST_RATE = 2e-3


class Given(msgspec.Struct, frozen=True):
    """Where a value that was decided before the search comes from."""

    value: str
    origin: Origin
    why: str


class PlanRequest(msgspec.Struct, frozen=True):
    """Everything that a plan is made from."""

    entry: ModelEntry
    preset: Preset
    device: PlanDevice
    budget_bytes: int
    data: DataRef | None = None
    lengths: SampleLengths | None = None
    """Sample lengths of `data`."""
    overrides: dict[str, object] = {}
    """Only what the user typed, by option name with underscores."""
    given: dict[str, Given] = {}
    """`gpu`, `budget` and `intent`, as they came about."""
    notes: tuple[str, ...] = ()
    """What reading the data found."""


class Candidate(msgspec.Struct, frozen=True):
    """The values that memory decides."""

    max_seq_len: int
    precision: Precision
    rank: int
    micro_batch_tokens: int
    checkpointing: Checkpointing
    loss_chunk_tokens: int


class Search:
    """One search; afterwards it knows what the chosen values were weighed against."""

    def __init__(self, request: PlanRequest) -> None:
        self.request = request
        self.pins: Pins = check_pins(dict(request.overrides))
        self.shape = request.entry.shape
        self.compute_dtype: ComputeDtype = self.pins.get("compute_dtype", request.device.compute_dtype)
        self.precisions = self._possible_precisions()
        self.ranks = self._possible_ranks()
        self.targets: tuple[str, ...] = self.pins.get("targets", request.preset.targets.value)
        self.samples_per_step = self._samples_per_step()
        method_of(self.method(self.ranks[-1])).targeted(self.method(self.ranks[-1]), self.shape)

    # What may be chosen ------------------------------------------------------------------------------------------

    def _possible_precisions(self) -> tuple[Precision, ...]:
        stored = self.request.entry.stored_as
        if stored in ("bnb-4bit", "bnb-8bit"):
            only: Precision = "nf4" if stored == "bnb-4bit" else "int8"
            if self.pins.get("precision", only) != only:
                raise UsageError(
                    f"this base is stored quantized ({stored}); it can only be used as {only}",
                    where="--precision",
                    hint="Add the original model for another precision",
                )
            return (only,)
        if "precision" in self.pins:
            return (self.pins["precision"],)
        dense: dict[ComputeDtype, tuple[Precision, ...]] = {
            # Held in the dtype of the products, a matrix needs no conversion at each of them.
            "fp32": ("fp32", "bf16"),
            "bf16": ("bf16",),
            "fp16": ("fp16",),
        }
        found: list[Precision] = []
        for name in self.request.preset.precisions.value:
            found += dense[self.compute_dtype] if name in ("bf16", "fp16") else (cast(Precision, name),)
        return tuple(dict.fromkeys(found))

    def _possible_ranks(self) -> tuple[int, ...]:
        if "rank" in self.pins:
            return (self.pins["rank"],)
        smallest = min(min(linear.in_features, linear.out_features) for linear in self.shape.adaptable)
        ranks = tuple(rank for rank in self.request.preset.ranks.value if rank <= smallest)
        return ranks or (smallest,)

    @property
    def context(self) -> int:
        """The longest sample that the model was made for."""
        return self.shape.context_length

    def target_length(self) -> int:
        """The length that is wanted when memory is no concern."""
        if "max_seq_len" in self.pins:
            return min(int(self.pins["max_seq_len"]), self.context)
        lengths = self.request.lengths
        if lengths is None:
            return min(self.request.preset.max_seq_len.value, self.context)
        return min(lengths.covering(self.request.preset.whole_share.value), self.context)

    def longest_sample(self, max_seq_len: int) -> int:
        """The longest sample that occurs under that limit."""
        lengths = self.request.lengths
        return max_seq_len if lengths is None else min(max_seq_len, max(lengths.longest, lengths.longest_held_out))

    def _samples_per_step(self) -> int:
        if "samples_per_step" in self.pins:
            return int(self.pins["samples_per_step"])
        wanted = self.request.preset.samples_per_step.value
        if self.request.lengths is None:
            return wanted
        # Some 25 steps a pass at least, down to 4 samples a step.
        few = self.request.lengths.samples // 25
        return max(min(4, wanted), min(wanted, 1 << max(0, few.bit_length() - 1)))

    # What a candidate costs --------------------------------------------------------------------------------------

    def method(self, rank: int) -> LoraConfig:
        """The method's config at a rank."""
        return LoraConfig(
            rank=rank,
            alpha=self.pins.get("alpha", 2.0 * rank),
            targets=self.targets,
            dropout=self.pins.get("dropout", self.request.preset.dropout.value),
        )

    def spec(self, candidate: Candidate) -> RunSpec:
        """The run of a candidate."""
        request, pins, preset = self.request, self.pins, self.request.preset
        recipe = Recipe(
            base=BaseRef(request.entry.name, request.entry.fingerprint, self.shape.architecture),
            data=request.data or DataRef(path="", fingerprint="", format=""),
            method=self.method(candidate.rank),
            precision=candidate.precision,
            compute_dtype=self.compute_dtype,
            max_seq_len=candidate.max_seq_len,
            samples_per_step=self.samples_per_step,
            overlong=pins.get("overlong", "truncate"),
            epochs=self.epochs(),
            max_steps=self.max_steps(),
            optimizer=Optimizer(
                learning_rate=self.learning_rate(),
                weight_decay=pins.get("weight_decay", preset.weight_decay.value),
            ),
            schedule=Schedule(
                name=pins.get("schedule", preset.schedule.value),
                warmup_fraction=pins.get("warmup", preset.warmup_fraction.value),
            ),
            seed=pins.get("seed", 0),
        )
        layout = Layout(candidate.micro_batch_tokens, candidate.checkpointing, candidate.loss_chunk_tokens)
        return RunSpec(recipe, layout, device=request.device.id, budget_bytes=request.budget_bytes)

    def cost(self, candidate: Candidate) -> Breakdown:
        """What a candidate needs."""
        lengths = self.request.lengths
        return estimate_training(
            self.spec(candidate),
            self.shape,
            longest_sample=self.longest_sample(candidate.max_seq_len),
            device_kind=self.request.device.kind,
            step_tokens=None if lengths is None else lengths.step_tokens(self.samples_per_step, candidate.max_seq_len),
        )

    def fits(self, candidate: Candidate) -> bool:
        """Whether its predicted peak is within the budget."""
        return self.cost(candidate).peak_bytes <= self.request.budget_bytes

    def leanest(self, max_seq_len: int, precision: Precision, rank: int) -> Candidate:
        """The layout that executes these with the least memory."""
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
        length = self._longest_affordable()
        least_rank = self.ranks[-1]
        precision = next(p for p in self.precisions if self.fits(self.leanest(length, p, least_rank)))
        rank = next(r for r in self.ranks if self.fits(self.leanest(length, precision, r)))
        return self._fastest(length, precision, rank)

    def smallest(self, max_seq_len: int) -> Candidate:
        """The candidate that needs least at a length."""
        return min(
            (self.leanest(max_seq_len, precision, self.ranks[-1]) for precision in self.precisions),
            key=lambda candidate: self.cost(candidate).peak_bytes,
        )

    def _longest_affordable(self) -> int:
        target = self.target_length()
        if self.fits(self.smallest(target)):
            return target
        least = min(target, self.request.preset.min_seq_len.value)
        if "max_seq_len" in self.pins or not self.fits(self.smallest(least)):
            raise self._refusal(target if "max_seq_len" in self.pins else least)
        low, high = least, target  # low fits, high does not
        while high - low > LENGTH_STEP:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(self.smallest(middle)) else (low, middle)
        return max(least, low // LENGTH_STEP * LENGTH_STEP)

    def _fastest(self, length: int, precision: Precision, rank: int) -> Candidate:
        lean = self.leanest(length, precision, rank)
        modes: tuple[Checkpointing, ...] = ("none", "layer")
        candidates = [
            msgspec.structs.replace(lean, micro_batch_tokens=tokens, checkpointing=mode, loss_chunk_tokens=chunk)
            for tokens in self._micro_batches(length)
            for mode in ((self.pins["checkpointing"],) if "checkpointing" in self.pins else modes)
            for chunk in ((self.pins["loss_chunk_tokens"],) if "loss_chunk_tokens" in self.pins else LOSS_CHUNKS)
        ]
        fitting = [candidate for candidate in candidates if self.fits(candidate)]
        return max(fitting, key=self.speed, default=lean)

    def _micro_batches(self, length: int) -> list[int]:
        if "micro_batch_tokens" in self.pins:
            return [self.pins["micro_batch_tokens"]]
        longest = self.longest_sample(length)
        most = SATURATION[self.request.device.kind][1]
        if self.request.lengths is not None:
            # A micro-batch never holds more than a whole step.
            most = min(most, self.request.lengths.step_tokens(self.samples_per_step, length))
        powers = [1 << bit for bit in range(6, 15)]
        return sorted({longest, max(longest, most), *(tokens for tokens in powers if longest < tokens < most)})

    def speed(self, candidate: Candidate) -> tuple[float, int]:
        """A relative speed, to rank layouts of one recipe; of equal ones the leaner goes first."""
        half, most = SATURATION[self.request.device.kind]
        tokens = min(most, max(candidate.micro_batch_tokens, self.longest_sample(candidate.max_seq_len)))
        speed = tokens / (tokens + half)
        if candidate.checkpointing == "layer":
            speed *= RECOMPUTE_SPEED
        # Smaller chunks cost a few launches more: they only break ties.
        return round(speed, 3), candidate.loss_chunk_tokens

    # What does not depend on memory ------------------------------------------------------------------------------

    def epochs(self) -> float:
        """Passes: the preset's, or more over small data."""
        if "epochs" in self.pins:
            return float(self.pins["epochs"])
        preset, lengths = self.request.preset, self.request.lengths
        if lengths is None:
            return preset.epochs.value
        wanted = math.ceil(preset.min_steps.value * self.samples_per_step / lengths.samples)
        return float(max(preset.epochs.value, min(preset.max_epochs.value, wanted)))

    def max_steps(self) -> int | None:
        """The limit of steps; a typed number of epochs lifts the preset's."""
        if "max_steps" in self.pins:
            return int(self.pins["max_steps"])
        return None if "epochs" in self.pins else self.request.preset.max_steps.value or None

    def learning_rate(self) -> float:
        """The preset's rate, adapted to the model's width."""
        if "learning_rate" in self.pins:
            return float(self.pins["learning_rate"])
        factor = (WIDTH_OF_PRESET_RATE / self.shape.hidden) ** RATE_EXPONENT
        return min(LARGEST_RATE, float(f"{self.request.preset.learning_rate.value * factor:.1e}"))

    # What was not chosen -----------------------------------------------------------------------------------------

    def alternatives(self, chosen: Candidate) -> tuple[Alternative, ...]:
        """Neighbours of the chosen plan, and what they would cost."""
        found: list[Alternative] = []

        def add(what: str, candidate: Candidate, brings: str) -> None:
            peak = self.cost(candidate).peak_bytes
            over = peak - self.request.budget_bytes
            found.append(Alternative(what, peak, over <= 0, f"{format_bytes(over)} too much" if over > 0 else brings))

        length, precision, rank = chosen.max_seq_len, chosen.precision, chosen.rank
        place = self.precisions.index(precision)
        if length < self.target_length():
            add(f"max-seq-len {self.target_length()}", self.leanest(self.target_length(), precision, rank), "fits")
        if place > 0:
            better = self.precisions[place - 1]
            add(f"precision {better}", self.leanest(length, better, rank), "fits with a smaller rank or layout")
        if place + 1 < len(self.precisions):
            lower = self.precisions[place + 1]
            add(f"precision {lower}", msgspec.structs.replace(chosen, precision=lower), "less exact base, less memory")
        if "rank" not in self.pins:
            larger = self.ranks[self.ranks.index(rank) - 1] if rank != self.ranks[0] else 2 * rank
            if self._rank_possible(larger):
                same = msgspec.structs.replace(chosen, rank=larger)
                add(f"rank {larger}", same if self.fits(same) else self.leanest(length, precision, larger), "fits too")
        if chosen.checkpointing == "layer":
            add("no checkpointing", msgspec.structs.replace(chosen, checkpointing="none"), "fits, but no faster here")
        else:
            add("checkpointing", msgspec.structs.replace(chosen, checkpointing="layer"), "about a third slower")
        return tuple(found)

    def _rank_possible(self, rank: int) -> bool:
        method = method_of(self.method(rank))
        targeted = method.targeted(self.method(self.ranks[-1]), self.shape)
        return rank <= min(min(linear.in_features, linear.out_features) for linear in targeted)

    def _refusal(self, length: int) -> DoesNotFit:
        budget = self.request.budget_bytes
        smallest = self.smallest(length)
        peak = self.cost(smallest).peak_bytes
        helps = [f"a budget of {format_bytes(peak * 1.01)}"]
        for name in (
            "precision",
            "max_seq_len",
            "rank",
            "checkpointing",
            "micro_batch_tokens",
            "loss_chunk_tokens",
            "targets",
        ):
            if name not in self.pins:
                continue
            rest = {key: value for key, value in self.request.overrides.items() if key != name}
            try:
                found = Search(msgspec.structs.replace(self.request, overrides=rest)).choose()
            except DoesNotFit:
                continue
            value = getattr(found, name, "all-linear")
            helps.insert(0, f"leaving out --{name.replace('_', '-')} (it fits with {value})")
        base = sum(
            size
            for category, size in self.cost(smallest).peak.bytes_by_category.items()
            if category in ("frozen weights", "quantization constants", "embeddings and head")
        )
        if base > budget / 2:
            helps.append(f"a smaller model: this base alone takes {format_bytes(base)} in {smallest.precision}")
        return DoesNotFit(
            f"{self.request.entry.name} needs {format_bytes(peak)} at the least ({smallest.precision}, "
            f"rank {smallest.rank}, {smallest.max_seq_len} tokens, checkpointing {smallest.checkpointing}), "
            f"{format_bytes(peak - budget)} more than the budget of {format_bytes(budget)}",
            hint="What would help: " + "; ".join(helps),
        )


def make_plan(request: PlanRequest) -> TrainPlan:
    """The best plan for a request.

    Raises:
        UsageError: an option cannot be meant, or does not suit the model.
        BadInput: a length limit leaves no sample.
        DoesNotFit: no plan fits; the message says by how much and what would help.
    """
    from edgepeft.plan.reasons import check_samples_left, describe, notes_of, steps_of

    search = Search(request)
    chosen = search.choose()
    spec = search.spec(chosen)
    lengths = request.lengths
    data = None if lengths is None else lengths.summary(chosen.max_seq_len, spec.recipe.overlong)
    if data is not None:
        check_samples_left(data, spec.recipe)
    steps = 0 if data is None else steps_of(spec.recipe, data.train_samples)
    evaluations = request.preset.evaluations.value
    every = search.pins.get("eval_every")
    if every is None:
        every = steps // evaluations if data is not None and data.eval_samples and evaluations > 1 else 0
    spec = msgspec.structs.replace(spec, upkeep=Upkeep(eval_every_steps=every))
    return TrainPlan(
        spec=spec,
        choices=describe(search, chosen, spec, data),
        memory=search.cost(chosen),
        steps=steps,
        data=data,
        alternatives=search.alternatives(chosen),
        notes=request.notes + notes_of(search, chosen, data),
    )
