"""A plan: a fully said run, where each of its values comes from and why, and what it is predicted to cost."""

from __future__ import annotations

from typing import Literal

import msgspec

from edgepeft.memory.breakdown import Breakdown
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


class TrainPlan(msgspec.Struct, frozen=True):
    """What `plan` prints and `train` executes; plan.json of a run."""

    spec: RunSpec
    choices: tuple[Choice, ...]
    memory: Breakdown
    steps: int
    """Optimizer steps of the whole run."""
    data: DataSummary | None = None
    """None when the plan was made without data."""
    seconds: float | None = None
    """Predicted training time; None when this machine's speed is not known."""
    alternatives: tuple[Alternative, ...] = ()
    """Runner-up plans."""
    notes: tuple[str, ...] = ()
    """Warnings that belong to the plan, such as a 4-bit-born base quantized again."""
    adapter_name: str = ""
    """Name in the adapter library that the run publishes to; empty until it is trained."""
