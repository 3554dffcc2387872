"""What finished runs really took, and the correction that the next prediction gets from it.

The frozen base is known to the byte, so only the rest is compared: activations, gradients, scratch, and on a card its
context and the allocator's slack. A correction belongs to a device, a torch version, an architecture and a version of
edgepeft: another version predicts by another formula.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from edgepeft import __version__
from edgepeft.memory.breakdown import Breakdown, Category, Phase
from edgepeft.paths import disk_errors, home, make_folder, write_atomic
from edgepeft.spec import Precision, RunSpec

BASE_CATEGORIES: tuple[Category, ...] = ("frozen weights", "quantization constants", "embeddings and head")
"""The frozen base in a ledger."""
KEPT_RUNS = 20
"""Runs that are kept for each key; the newest."""
KEPT_KEYS = 200
"""Keys that are kept; those seen last."""
COMPARED_RUNS = 5
"""Newest runs that make a correction."""
RUNS_TO_LOWER = 3
"""Runs below which a prediction is never lowered."""
LOWERED_SHARE = 0.5
"""Part of an over-prediction that is taken back: too low a prediction ends a run, too high a one costs some speed."""
ALIKE = 16.0
"""Bases up to this many times smaller or larger tell of each other: what is off by a fixed amount is much of a toy."""
LIMITS = (0.9, 1.5)
"""A factor beyond these is a mistake of something else than the prediction."""


class Observation(msgspec.Struct, frozen=True):
    """One run that was measured from its first step on; `observed` makes it."""

    device: str
    """`cpu`, or the UUID of a card."""
    device_name: str
    torch: str
    """`torch.__version__`, with its suffix."""
    architecture: str
    """Class name in transformers."""
    model: str
    """Name in the store."""
    precision: Precision
    base_bytes: int
    """The frozen base, as predicted."""
    predicted_bytes: int
    """The peak as it was predicted before any correction."""
    measured_bytes: int
    """The same quantity as it was measured: live tensor bytes on the CPU; on a card all that the process held of it."""
    operations: float
    """Floating-point operations of the products in the measured steps, as the plan counts them."""
    seconds: float
    """What those steps took; 0 where it is not known."""
    tokens_per_second: float
    run: str
    """Id of the run."""
    time: str
    """ISO date and time with zone."""
    edgepeft: str = __version__

    @property
    def ratio(self) -> float | None:
        """Measured over predicted, both without the base; None when the figures cannot be meant."""
        predicted, measured = self.predicted_bytes - self.base_bytes, self.measured_bytes - self.base_bytes
        return measured / predicted if predicted > 0 and measured > 0 else None

    @property
    def operations_per_second(self) -> float | None:
        """None when the steps were not timed."""
        rate = self.operations / self.seconds if self.seconds > 0 else 0.0
        return rate if rate > 0 and math.isfinite(rate) else None


class Correction(msgspec.Struct, frozen=True):
    """What earlier runs put on a prediction."""

    factor: float
    """Multiplies everything but the frozen base."""
    runs: int
    """Runs that it comes from."""


def observed(
    spec: RunSpec,
    memory: Breakdown,
    *,
    run: str,
    device_name: str,
    torch: str,
    measured_bytes: int,
    operations: float,
    seconds: float,
    tokens_per_second: float,
) -> Observation:
    """The observation of a run that kept its planned layout.

    Args:
        spec: what was executed.
        memory: the plan's prediction.
        run: id of the run.
        device_name: the processor's or the card's.
        torch: `torch.__version__`.
        measured_bytes: the measured peak; see `Observation.measured_bytes`.
        operations: `plan.operations` times the share of the plan's steps that were measured.
        seconds: what these steps took.
        tokens_per_second: measured over them.
    """
    return Observation(
        device=spec.device,
        device_name=device_name,
        torch=str(torch),
        architecture=spec.recipe.base.architecture,
        model=spec.recipe.base.model,
        precision=spec.recipe.precision,
        base_bytes=base_bytes_of(memory.peak),
        predicted_bytes=uncorrected_peak_bytes(memory),
        measured_bytes=measured_bytes,
        operations=operations,
        seconds=seconds,
        tokens_per_second=tokens_per_second,
        run=run,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def observe(observation: Observation) -> None:
    """Keeps an observation beside the earlier ones; one of the same run takes its place.

    Raises:
        DiskProblem: the disk is full, or may not be written.
    """
    from filelock import FileLock

    path = calibration_file()
    make_folder(path.parent)
    with disk_errors(path), FileLock(path.with_name(f".{path.name}.lock")):
        every = _read_all()
        key = _key(observation.device, observation.torch, observation.architecture)
        others = [other for other in every.pop(key, []) if other.run != observation.run]
        every[key] = [*others, observation][-KEPT_RUNS:]
        newest = dict(list(every.items())[-KEPT_KEYS:])
        write_atomic(path, json.dumps(msgspec.to_builtins(newest), indent=1) + "\n")


def observations(device: str, torch: str | None, architecture: str | None = None) -> list[Observation]:
    """What was observed on a device with a torch version, oldest first; of one architecture, or of all."""
    if torch is None:
        return []
    every = _read_all()
    if architecture is not None:
        return every.get(_key(device, torch, architecture), [])
    found = [one for many in every.values() for one in many if (one.device, one.torch) == (device, torch)]
    return sorted(found, key=lambda one: one.time)


def correction(
    device: str, torch: str | None, architecture: str, *, base_bytes: float | None = None
) -> Correction | None:
    """What earlier runs say about predictions for this device, torch version and architecture; None without runs.

    Where `base_bytes` is given, runs over bases of another order of size are left out. The rule: of measured ÷
    predicted (both without the frozen base) in the newest 5 runs the second largest counts; of one or two runs the
    larger. Above 1 it is the factor. Below 1 it needs 3 runs, and only half of the difference is taken back, since a
    prediction that is too low ends a run and one that is too high costs some speed. The factor stays within 0.9 and
    1.5.
    """
    seen = [one for one in observations(device, torch, architecture) if one.edgepeft == __version__]
    if base_bytes is not None:
        seen = [one for one in seen if base_bytes / ALIKE <= one.base_bytes <= base_bytes * ALIKE]
    return correction_of(one.ratio for one in seen if one.ratio is not None)


def correction_of(ratios: Iterable[float]) -> Correction | None:
    """The rule of `correction` for ratios from the oldest to the newest."""
    newest = [ratio for ratio in ratios if math.isfinite(ratio)][-COMPARED_RUNS:]
    if not newest:
        return None
    highest = sorted(newest, reverse=True)
    factor = highest[1] if len(highest) >= 3 else highest[0]
    if factor < 1:
        factor = 1.0 if len(newest) < RUNS_TO_LOWER else 1 - LOWERED_SHARE * (1 - factor)
    low, high = LIMITS
    return Correction(min(high, max(low, factor)), len(newest))


def corrected(memory: Breakdown, found: Correction | None) -> Breakdown:
    """The prediction with the factor on every category but the frozen base's; `memory` must not have one yet."""
    if found is None or found.factor == 1:
        return memory
    phases = tuple(
        msgspec.structs.replace(
            phase,
            bytes_by_category={
                name: size if name in BASE_CATEGORIES else round(size * found.factor)
                for name, size in phase.bytes_by_category.items()
            },
            reserved_bytes=None if phase.reserved_bytes is None else _stretched(phase, found.factor),
        )
        for phase in memory.phases
    )
    return msgspec.structs.replace(memory, phases=phases, correction=found.factor)


def uncorrected_peak_bytes(memory: Breakdown) -> int:
    """The peak as it was before `corrected`."""
    base = base_bytes_of(memory.peak)
    return base + round((memory.peak_bytes - base) / memory.correction)


def base_bytes_of(phase: Phase) -> int:
    """The frozen base in a phase."""
    return sum(phase.bytes_by_category.get(name, 0) for name in BASE_CATEGORIES)


def calibration_file() -> Path:
    """Where observations are kept."""
    return home().cache / "calibration.json"


def _stretched(phase: Phase, factor: float) -> int:
    base = base_bytes_of(phase)
    return base + round(((phase.reserved_bytes or 0) - base) * factor)


def _key(device: str, torch: str, architecture: str) -> str:
    return f"{device} torch {torch} {architecture}"


def _read_all() -> dict[str, list[Observation]]:
    try:
        return msgspec.json.decode(calibration_file().read_bytes(), type=dict[str, list[Observation]])
    except (OSError, msgspec.MsgspecError):
        # A cache: what cannot be read is observed again.
        return {}
