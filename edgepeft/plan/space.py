"""What a search may choose from, and what does not depend on memory at all."""

from __future__ import annotations

import itertools
import math
from typing import cast

from edgepeft.errors import UsageError
from edgepeft.methods import METHODS, MethodConfig, count_parameters, id_of, make_config, no_lora_plus
from edgepeft.methods.full import QUANTIZED, cannot_train
from edgepeft.plan.pins import Pins, check_pins
from edgepeft.plan.request import Candidate, PlanRequest
from edgepeft.spec import (
    BaseRef,
    ComputeDtype,
    DataRef,
    Layout,
    Optimizer,
    Precision,
    Recipe,
    RunSpec,
    Schedule,
    Unfreeze,
)

RANK_STEP = 4
"""A rank between two of the preset's is a multiple of this."""
WIDTH_OF_PRESET_RATE = 4096
RATE_EXPONENT = 0.82
"""The learning rate goes as width^-0.82: through 2e-4 at 4,096 (QLoRA's rate for Llama-7B, arXiv 2305.14314, which
lowers it to 1e-4 from 6,656 on) and 1e-3 at 576, found by trial on the embedded model."""
LARGEST_RATE = 2e-3


class Space:
    """The choices that a request leaves open, and the run that each candidate stands for."""

    def __init__(self, request: PlanRequest) -> None:
        self.request = request
        self.pins: Pins = check_pins(dict(request.overrides))
        self.shape = request.entry.shape
        self.compute_dtype: ComputeDtype = self.pins.get("compute_dtype", request.device.compute_dtype)
        parent = request.parent
        self.method_id: str = self.pins.get("method", "lora") if parent is None else id_of(parent.method)
        self.precisions = self._possible_precisions()
        # A search asks for each of them thousands of times.
        self._methods: dict[int, MethodConfig] = {}
        self.ranks = self._possible_ranks()
        # 0 alone for a method whose size memory does not decide.
        self.samples_per_step = self._samples_per_step()
        config, method = self.method(self.ranks[-1]), METHODS[self.method_id]
        if self.pins.get("lora_plus_ratio", 1) != 1 and not METHODS[self.method_id].ranked:
            why = no_lora_plus(self.method(self.ranks[-1]))
            raise UsageError(why, where="--lora-plus-ratio", hint="Leave it out")
        # Refuses what does not suit the model.
        count_parameters(config, self.shape)
        self.leading_rows = method.leading_rows(config)
        """Rows that the method puts before each sample."""
        self.context = self.shape.context_length - method.leading_tokens(config)
        """The longest sample that the model was made for, behind what the method puts before it."""

    # What may be chosen ------------------------------------------------------------------------------------------

    def _possible_precisions(self) -> tuple[Precision, ...]:
        stored = self.request.entry.stored_as
        dense_alone = METHODS[self.method_id].needs_dense_base
        if stored in ("bnb-4bit", "bnb-8bit"):
            only: Precision = "nf4" if stored == "bnb-4bit" else "int8"
            if dense_alone:
                hint = "Add the original model, or use another --method"
                raise UsageError(f"this base is stored quantized; {cannot_train(only)}", where="--method", hint=hint)
            if self.pins.get("precision", only) != only:
                raise UsageError(
                    f"this base is stored quantized ({stored}); it can only be used as {only}",
                    where="--precision",
                    hint="Add the original model for another precision",
                )
            return (only,)
        if "precision" in self.pins:
            pinned: Precision = self.pins["precision"]
            if dense_alone and pinned in QUANTIZED:
                raise UsageError(cannot_train(pinned), where="--precision", hint="Use --precision bf16")
            return (pinned,)
        dense: dict[ComputeDtype, tuple[Precision, ...]] = {
            # Held in the dtype of the products, a matrix needs no conversion at each of them.
            "fp32": ("fp32", "bf16"),
            "bf16": ("bf16",),
            "fp16": ("fp16",),
        }
        found: list[Precision] = []
        wanted = ("bf16",) if dense_alone else self.request.preset.precisions.value
        for name in wanted:
            found += dense[self.compute_dtype] if name in ("bf16", "fp16") else (cast(Precision, name),)
        return tuple(dict.fromkeys(found))

    def _possible_ranks(self) -> tuple[int, ...]:
        if not METHODS[self.method_id].ranked:
            return (0,)
        if "rank" in self.pins:
            return (self.pins["rank"],)
        smallest = min(min(linear.in_features, linear.out_features) for linear in self.shape.adaptable)
        ranks = [rank for rank in self.request.preset.ranks.value if rank <= smallest] or [smallest]
        between = [(high + low) // 2 // RANK_STEP * RANK_STEP for high, low in itertools.pairwise(ranks)]
        return tuple(sorted({*ranks, *(rank for rank in between if rank > ranks[-1])}, reverse=True))

    def target_length(self) -> int:
        """The length that is wanted when memory is no concern."""
        if "max_seq_len" in self.pins:
            return min(int(self.pins["max_seq_len"]), self.context)
        lengths = self.request.lengths
        if lengths is None:
            return min(self.request.preset.max_seq_len.value, self.context)
        return min(lengths.covering(self.request.preset.whole_share.value), self.context)

    def longest_sample(self, max_seq_len: int) -> int:
        """Most rows of a sample that go through the model under that limit."""
        rows, lengths = self.leading_rows, self.request.lengths
        return max_seq_len + rows if lengths is None else lengths.longest_computed(max_seq_len, rows)

    def _samples_per_step(self) -> int:
        if "samples_per_step" in self.pins:
            return int(self.pins["samples_per_step"])
        wanted = self.request.preset.samples_per_step.value
        if self.request.lengths is None:
            return wanted
        # Some 25 steps a pass at least, down to 4 samples a step.
        few = self.request.lengths.samples // 25
        return max(min(4, wanted), min(wanted, 1 << max(0, few.bit_length() - 1)))

    # What a candidate stands for ---------------------------------------------------------------------------------

    def method(self, rank: int) -> MethodConfig:
        """The method's config, at a rank where memory decides it."""
        if self.request.parent is not None:
            return self.request.parent.method
        if rank not in self._methods:
            self._methods[rank] = self._make_method(rank)
        return self._methods[rank]

    def _make_method(self, rank: int) -> MethodConfig:
        options = ("rank", "alpha", "targets", "dropout")
        settings: dict[str, object] = {name: self.pins[name] for name in options if name in self.pins}
        settings |= self.pins["settings"]
        if METHODS[self.method_id].ranked:
            preset = self.request.preset
            settings.setdefault("alpha", 2.0 * rank)
            settings.setdefault("targets", preset.targets.value)
            settings.setdefault("dropout", preset.dropout.value)
            settings["rank"] = rank
        return make_config(self.method_id, settings)

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
                name=pins.get("optimizer", "adamw"),
                lora_plus_ratio=pins.get("lora_plus_ratio", 1.0),
                learning_rate=self.learning_rate(),
                weight_decay=pins.get("weight_decay", preset.weight_decay.value),
            ),
            schedule=Schedule(
                name=pins.get("schedule", preset.schedule.value),
                warmup_fraction=pins.get("warmup", preset.warmup_fraction.value),
            ),
            seed=pins.get("seed", 0),
            parent=request.parent.ref if request.parent is not None else None,
            unfreeze=self.unfreeze(),
        )
        layout = Layout(
            candidate.micro_batch_tokens,
            candidate.checkpointing,
            candidate.loss_chunk_tokens,
            deterministic=pins.get("deterministic", False),
        )
        return RunSpec(recipe, layout, device=request.device.id, budget_bytes=request.budget_bytes)

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

    def unfreeze(self) -> Unfreeze | None:
        """When layers begin to train; never anything but what was typed."""
        share, every = self.pins.get("unfreeze"), self.pins.get("unfreeze_every")
        return None if share is None and every is None else Unfreeze(share, every)

    def learning_rate(self) -> float:
        """The preset's rate, adapted to the model's width."""
        if "learning_rate" in self.pins:
            return float(self.pins["learning_rate"])
        factor = (WIDTH_OF_PRESET_RATE / self.shape.hidden) ** RATE_EXPONENT
        rate = min(LARGEST_RATE, self.request.preset.learning_rate.value * factor)
        return float(f"{rate * METHODS[self.method_id].rate:.1e}")
