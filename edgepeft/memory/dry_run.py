"""What a dry run is asked and what it answers; the run itself is `edgepeft.engine.workers.simulate`, a process."""

from __future__ import annotations

from typing import Any

import msgspec

from edgepeft.memory.breakdown import Breakdown
from edgepeft.memory.target import Target
from edgepeft.memory.workload import Workload
from edgepeft.spec import RunSpec


class DryRunRequest(msgspec.Struct, frozen=True):
    """A training step to be executed on tensors without values."""

    spec: RunSpec
    config: dict[str, Any]
    """The model's config.json; no weights are needed."""
    workload: Workload
    target: Target
    full: bool = False
    """Simulate every layer instead of extrapolating from a few; slow for large models."""


class DryRun(msgspec.Struct, frozen=True):
    """What the step would hold."""

    memory: Breakdown
    """By phase and category; `Phase.place` says where the peak is."""
    layers: int
    """Decoder layers of the model."""
    simulated: tuple[int, ...]
    """Layer counts that were executed; one that equals `layers` means nothing was extrapolated."""
    seconds: float
    """After imports."""
    torch: str
    """Version whose operations were followed."""
    device: str
    """Whose kernels were simulated, such as `cpu` or `cuda 8.9, on fake CPU tensors`."""


class DryRunFailed(msgspec.Struct, frozen=True):
    """Why it could not be done; the fields of an EdgepeftError."""

    code: int
    what: str
    where: str = ""
    hint: str = ""
