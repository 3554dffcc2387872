"""A plan: a fully said run, where each of its values comes from and why, and what it is predicted to cost."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from edgepeft.memory.breakdown import Breakdown
from edgepeft.memory.dry_run import DryRun
from edgepeft.memory.resident import Traffic
from edgepeft.memory.workload import Workload
from edgepeft.spec import RunSpec

Origin = Literal["auto", "preset", "config", "user"]


class Choice(msgspec.Struct, frozen=True):
    """One decided value, as it is shown."""

    what: str
    """Name as the option spells it, such as `max-seq-len`."""
    value: str
    """The value as people write it."""
    origin: Origin
    why: str
    """One line."""


class Alternative(msgspec.Struct, frozen=True):
    """A neighbouring plan that was not chosen, and what it would cost."""

    what: str
    """How it differs, in a few words."""
    peak_bytes: int
    fits: bool
    """Whether it stays within the budget."""
    why: str
    """Why it was not chosen, or what it would bring."""
    seconds: float | None = None
    """Predicted time of its whole run; None where that is not known."""
    changes: dict[str, str] = {}
    """The options that make it of the chosen plan, by name as one types them."""


class DataSummary(msgspec.Struct, frozen=True):
    """What the plan knows about the data."""

    samples: int
    """Usable samples before the held-out split."""
    train_samples: int
    eval_samples: int
    tokens: int
    """Tokens of all training samples after truncation."""
    trained_tokens: int
    """Tokens of them that carry loss."""
    length_p50: int
    length_p99: int
    length_max: int
    """Longest sample before truncation, in tokens."""
    overlong: int
    """Samples above the plan's max_seq_len."""
    estimated: bool = False
    """Whether tokens were estimated from characters, for want of the model's tokenizer."""


class TrainPlan(msgspec.Struct, frozen=True):
    """What `plan` prints and `train` executes; plan.json of a run."""

    spec: RunSpec
    choices: tuple[Choice, ...]
    memory: Breakdown
    steps: int
    """Optimizer steps of the whole run."""
    data: DataSummary | None = None
    """None when the plan was made without data."""
    operations: float = 0.0
    """Floating-point operations of the products in all training steps; 0 where they were not counted."""
    seconds: float | None = None
    """Predicted time of the whole run, with loading and evaluations; None when the device's speed is not known."""
    alternatives: tuple[Alternative, ...] = ()
    """Runner-up plans."""
    notes: tuple[str, ...] = ()
    """Warnings that belong to the plan, such as a 4-bit-born base quantized again."""
    wants_more: dict[str, int] = {}
    """What more memory would make better, and the budget in bytes from which on; empty when nothing better is left."""
    workload: Workload | None = None
    """The micro-batches at the highest points of the train step and of an evaluation."""
    dry_run: DryRun | None = None
    """What a dry run of the plan held, where one was made."""
    adapter_name: str = ""
    """Name in the adapter library that the run publishes to; empty until it is trained."""

    def traffic(self) -> Traffic:
        """What the run computes on, its probe and two evaluations included."""
        recipe, data = self.spec.recipe, self.data
        longest = recipe.max_seq_len if data is None else min(recipe.max_seq_len, data.length_max)
        mean = longest if data is None else data.tokens / max(1, data.train_samples)
        of_step = max(1, math.ceil(recipe.samples_per_step * mean / self.spec.layout.micro_batch_tokens))
        return Traffic(
            micro_batches=self.steps * of_step + 3, samples=self.steps * recipe.samples_per_step, longest=longest
        )
