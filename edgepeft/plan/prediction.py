"""A run's predicted memory: the worst of its micro-batches, phase by phase, with what earlier runs taught."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from edgepeft.memory.breakdown import Breakdown, Phase
from edgepeft.memory.calibration import Correction, calibration_file, corrected, correction
from edgepeft.memory.estimate import estimate_training
from edgepeft.memory.target import Target
from edgepeft.memory.weights import ELEMENT_BYTES
from edgepeft.memory.workload import Workload
from edgepeft.models.shape import ModelShape
from edgepeft.plan.device import PlanDevice
from edgepeft.spec import RunSpec


class Prediction(msgspec.Struct, frozen=True):
    """What a run needs."""

    memory: Breakdown
    workload: Workload
    """The micro-batches at the highest points of the train step and of an evaluation."""

    @property
    def safe_bytes(self) -> int:
        """The peak with what the measured one may lie above it."""
        return round(self.memory.peak_bytes * (1 + self.memory.uncertainty))


def predict(
    spec: RunSpec, shape: ModelShape, workloads: Sequence[Workload], target: Target, found: Correction | None = None
) -> Prediction:
    """The closed form for the micro-batches of a run.

    Args:
        spec: the run.
        shape: its base.
        workloads: at least one; the phases are those that need most.
        target: the device.
        found: what to correct it by.

    Raises:
        UsageError: the method's targets or rank do not suit the model.
    """
    each = [estimate_training(spec, shape, workload, target) for workload in workloads]
    worst: dict[str, tuple[Phase, Workload]] = {}
    for workload, memory in zip(workloads, each, strict=True):
        for phase in memory.phases:
            if phase.name not in worst or phase.total_bytes > worst[phase.name][0].total_bytes:
                worst[phase.name] = phase, workload
    memory = msgspec.structs.replace(each[0], phases=tuple(worst[phase.name][0] for phase in each[0].phases))
    step, held_out = (worst.get(name, (None, workloads[0]))[1] for name in ("train step", "evaluation"))
    decides = msgspec.structs.replace(
        step,
        held_out_tokens=held_out.held_out_tokens,
        held_out_longest=held_out.held_out_longest,
        held_out_trained=held_out.held_out_trained,
        held_out_samples=held_out.held_out_samples,
    )
    return Prediction(corrected(memory, found), decides)


def correction_for(device: PlanDevice, shape: ModelShape) -> Correction | None:
    """What earlier runs on a device say about models like this; None for a device of another machine."""
    if not device.present or not calibration_file().exists():
        return None
    from edgepeft.hardware.packages import read_packages

    # The size does not depend on the precision, so that all candidates of a search are corrected alike.
    base_bytes = ELEMENT_BYTES["bf16"] * shape.parameters
    return correction(device.id, read_packages().torch, shape.architecture, base_bytes=base_bytes)
