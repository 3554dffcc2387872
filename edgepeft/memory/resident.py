"""What a training process on the CPU holds of the RAM: its tensors, and named rows for what no tensor shows.

Resident means anonymous and shared pages, without files that are only mapped, counted from the worker's `started` event
on: after its imports, before the model is loaded. All figures are for Linux with glibc under the settings of
`edgepeft.processes`; elsewhere they are a guess.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec

from edgepeft.memory.breakdown import Breakdown, Category, Phase
from edgepeft.memory.unseen import Provenance
from edgepeft.processes import ONEDNN_PRIMITIVES
from edgepeft.spec import Recipe, RunSpec
from edgepeft.units import MIB

if TYPE_CHECKING:
    from edgepeft.hardware.snapshot import HostSnapshot

PYTHON_BYTES = 14 * MIB
"""Modules imported while a run begins, Python's own objects, and the samples' table."""
BITSANDBYTES_BYTES = 42 * MIB
"""What importing bitsandbytes leaves; a run does so when it loads a base in NF4."""
MKL_BYTES_OF_THREAD = 5 * MIB
"""Panels that MKL packs matrices into; each thread of a product keeps its own."""
ONEDNN_BYTES_OF_PRIMITIVE = MIB // 2
"""A compiled product with its descriptors."""
ONEDNN_BYTES_WITHOUT_AMX = MIB
"""The same in 16 bit on a processor without AMX, packed operands included."""
HEAP_SHARE = 0.06
"""Holes in the heap, as a share of the tensors that come and go."""
_KEPT: tuple[Category, ...] = ("frozen weights", "quantization constants", "embeddings and head")
"""Made once while loading, after which free memory is given back: they leave no holes."""


class ResidentRow(msgspec.Struct, frozen=True):
    """One part of the resident memory."""

    name: str
    size_bytes: int
    provenance: Provenance
    source: str
    """Where the figure is from."""


class Resident(msgspec.Struct, frozen=True):
    """The prediction of a process's resident memory."""

    rows: tuple[ResidentRow, ...]
    phase: str
    """When it is largest."""

    @property
    def total_bytes(self) -> int:
        """At its highest."""
        return sum(row.size_bytes for row in self.rows)


def predict_resident(memory: Breakdown, spec: RunSpec, host: HostSnapshot) -> Resident | None:
    """Resident bytes of a run's process at their highest.

    Args:
        memory: the run's predicted tensors.
        spec: the run.
        host: the machine that it runs on.

    Returns:
        None for a run on a card: what the host then holds is small and the driver's affair.
    """
    if spec.device != "cpu":
        return None
    largest = max((_rows(phase, spec.recipe, host) for phase in memory.phases), key=_total)
    phase = next(phase for phase in memory.phases if _rows(phase, spec.recipe, host) == largest)
    return Resident(largest, phase.name)


def threads_of_products(host: HostSnapshot) -> int:
    """Threads that a worker's products use: what OMP_NUM_THREADS says, or the physical cores."""
    text = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(text) if text.isdigit() and int(text) else host.physical_cores or host.logical_cores


def _rows(phase: Phase, recipe: Recipe, host: HostSnapshot) -> tuple[ResidentRow, ...]:
    tensors = phase.total_bytes
    changing = tensors - sum(phase.bytes_by_category.get(name, 0) for name in _KEPT)
    rows = [
        ResidentRow("tensors", tensors, "measured", "the run's ledger"),
        ResidentRow("Python and modules", PYTHON_BYTES, "measured", "import by import in a fresh worker"),
        ResidentRow("holes in the heap", round(HEAP_SHARE * changing), "measured", "runs of this project"),
    ]
    if recipe.precision == "nf4":
        rows.append(ResidentRow("bitsandbytes", BITSANDBYTES_BYTES, "measured", "0.50.2, before and after its import"))
    if recipe.compute_dtype == "fp32":
        size = MKL_BYTES_OF_THREAD * threads_of_products(host)
        rows.append(ResidentRow("MKL's panels", size, "measured", "products of several shapes with 1, 2 and 4 threads"))
    elif host.flags.avx512:
        if host.flags.amx_bf16:
            size = ONEDNN_BYTES_OF_PRIMITIVE
            source = "300 float32 products of different shapes on AVX2; 16-bit ones are assumed to be alike"
            provenance: Provenance = "assumed"
        else:
            size, provenance = ONEDNN_BYTES_WITHOUT_AMX, "measured"
            source = "nine runs on two cores of Zen 5, 0.7 to 1.6 MiB a product"
        rows.append(ResidentRow("oneDNN's products", size * ONEDNN_PRIMITIVES, provenance, source))
    return tuple(rows)


def _total(rows: tuple[ResidentRow, ...]) -> int:
    return sum(row.size_bytes for row in rows)
