"""Short ways to a request for a plan, for tests: a base, a device and samples of given lengths, all made up."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from edgepeft.models.shape import ModelShape
from edgepeft.models.store import ModelEntry
from edgepeft.plan.device import PlanDevice
from edgepeft.plan.lengths import SampleLengths
from edgepeft.plan.request import PlanRequest
from edgepeft.profiles import find_preset
from edgepeft.spec import DataRef
from edgepeft.units import GIB
from shapes import SMOLLM2

DATA = DataRef("/data/x.jsonl", "sha256:1", "alpaca")


class Table:
    """The part of a token table that plans read."""

    def __init__(self, lengths: Any, trained: Any = None) -> None:
        self.lengths = np.asarray(lengths, np.int32)
        self.trained = self.lengths // 2 if trained is None else trained

    def trainable(self) -> Any:
        return np.where(self.trained > 0, self.lengths, 0), self.trained

    def limited(self, max_seq_len: int, overlong: str) -> Table:
        if overlong == "drop":
            kept = self.lengths <= max_seq_len
            return Table(self.lengths[kept], self.trained[kept])
        return Table(self.lengths.clip(max=max_seq_len), self.trained.clip(max=max_seq_len))


def entry(shape: ModelShape = SMOLLM2, **changes: Any) -> ModelEntry:
    """A base in the store."""
    values: dict[str, Any] = {
        "name": "base",
        "kind": "folder",
        "folder": "/m",
        "weights": "/m",
        "source": "/m",
        "fingerprint": "sha256:2",
        "shape": shape,
        "stored_as": "bf16",
        "weights_bytes": 1,
        "licence": None,
        "notes": (),
        "added": "2026-01-01T00:00:00+00:00",
    }
    return ModelEntry(**values | changes)


def device(kind: Any = "cpu", **changes: Any) -> PlanDevice:
    """A device with 64 GiB."""
    made = PlanDevice(kind, kind, kind, 64 * GIB, 32 * GIB, "all", "bf16", "it has it")
    return msgspec.structs.replace(made, **changes)


def request(
    budget: int = 8 * GIB,
    *,
    lengths: Any = None,
    preset: str = "balanced",
    base: ModelEntry | None = None,
    **overrides: Any,
) -> PlanRequest:
    """A request; `lengths` are those of the samples, what is left over is an option that the user typed."""
    on = overrides.pop("on", device())
    known = None if lengths is None else SampleLengths(Table(lengths), Table([40, 50]))
    return PlanRequest(base or entry(), find_preset(preset), on, budget, DATA if known else None, known, overrides)
