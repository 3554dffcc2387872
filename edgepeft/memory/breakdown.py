"""The ledger: bytes by category within each phase of a run, named alike in predictions, events and on screen."""

from __future__ import annotations

from typing import Literal

import msgspec

Category = Literal[
    "frozen weights",
    "quantization constants",
    "embeddings and head",
    "adapter weights",
    "gradients",
    "optimizer state",
    "saved activations",
    "recomputed layer",
    "logits and loss",
    "workspace",
    "KV cache",
    "device context",
    "allocator slack",
]
PhaseName = Literal["load", "train step", "evaluation", "save", "chat"]


class Phase(msgspec.Struct, frozen=True):
    """What lives at the peak of one phase."""

    name: PhaseName
    bytes_by_category: dict[Category, int]
    """Categories that are zero may be left out."""
    place: str = ""
    """Where in the phase the peak is, such as `backward of layer 1`; empty when it was not looked for."""
    reserved_bytes: int | None = None
    """What the CUDA allocator holds from the driver at the most, context included; None where there is no such."""

    @property
    def total_bytes(self) -> int:
        """The phase's peak."""
        return sum(self.bytes_by_category.values())


class Breakdown(msgspec.Struct, frozen=True):
    """A prediction of memory for every phase of a run."""

    phases: tuple[Phase, ...]
    uncertainty: float = 0.0
    """Share of the peak by which the measured value may lie above it."""
    correction: float = 1.0
    """Factor that earlier measurements on this device put on it; the bytes have it already."""

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total_bytes)

    @property
    def peak_bytes(self) -> int:
        """Bytes at the run's highest point."""
        return self.peak.total_bytes
