"""What a plan is made from, and the values that a search decides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from edgepeft.plan.device import PlanDevice
from edgepeft.plan.lengths import SampleLengths
from edgepeft.plan.train_plan import Origin
from edgepeft.profiles import Preset
from edgepeft.spec import Checkpointing, DataRef, Precision

if TYPE_CHECKING:
    from edgepeft.library.parent import Parent
    from edgepeft.models.described import DescribedModel
    from edgepeft.models.store import ModelEntry


class Given(msgspec.Struct, frozen=True):
    """Where a value that was decided before the search comes from."""

    value: str
    origin: Origin
    why: str


class PlanRequest(msgspec.Struct, frozen=True):
    """Everything that a plan is made from."""

    entry: ModelEntry | DescribedModel
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
    parent: Parent | None = None
    """The adapter that is continued; its values are among `overrides`."""
    config: dict[str, Any] | None = None
    """The model's config.json; None reads it from the entry's folder when a dry run needs it."""
    factors: dict[Checkpointing, float] = {}
    """What dry runs put on the closed form, by checkpointing; on everything but the frozen base."""
    uncertainty: float | None = None
    """Share by which the closed form may be off, where that is not for itself to say."""


class Candidate(msgspec.Struct, frozen=True):
    """The values that memory decides."""

    max_seq_len: int
    precision: Precision
    rank: int
    """0 for a method whose size memory does not decide."""
    micro_batch_tokens: int
    checkpointing: Checkpointing
    loss_chunk_tokens: int
