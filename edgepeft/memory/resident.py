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
from edgepeft.memory.chunks import ATTENTION_STEP, TOKEN_STEP
from edgepeft.memory.unseen import Provenance
from edgepeft.processes import ONEDNN_PRIMITIVES
from edgepeft.spec import Recipe, RunSpec
from edgepeft.units import KIB, MIB

if TYPE_CHECKING:
    from edgepeft.hardware.snapshot import HostSnapshot

PYTHON_BYTES = 14 * MIB
"""Modules imported while a run begins, Python's own objects, and the samples' table."""
BITSANDBYTES_BYTES = 42 * MIB
"""What importing bitsandbytes leaves; a run does so when it loads a base in NF4."""
MKL_BYTES_OF_THREAD = 5 * MIB
"""Panels that MKL packs matrices into; each thread of a product keeps its own."""
ONEDNN_BYTES_OF_SHAPE = 277 * KIB
"""What oneDNN keeps for each shape that a product ever had, whatever its cache forgets."""
ONEDNN_BYTES_OF_PRIMITIVE = 340 * KIB
"""What it keeps beside that for a compiled product in its cache."""
SHAPES_OF_ROW_LENGTH = 27
"""Shapes of products that the layers and the head have with rows of one length, in forward and backward."""
SHAPES_OF_SAMPLE_LENGTH = 3.3
"""Shapes that attention adds for samples of one length; four to six, some of which other lengths share."""
TOKENIZER_SHARE = 7
"""Bytes that reading a tokenizer leaves behind when it is gone, for each byte of its file."""
HEAP_SHARE = 0.15
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


class Traffic(msgspec.Struct, frozen=True):
    """What a run computes on: how many shapes its products get depends on it."""

    micro_batches: int
    """Of all steps and evaluations."""
    samples: int
    """Sequences in them."""
    longest: int
    """Tokens of the longest sample."""


class Resident(msgspec.Struct, frozen=True):
    """The prediction of a process's resident memory."""

    rows: tuple[ResidentRow, ...]
    phase: str
    """When it is largest."""

    @property
    def total_bytes(self) -> int:
        """At its highest."""
        return sum(row.size_bytes for row in self.rows)


def predict_resident(
    memory: Breakdown, spec: RunSpec, host: HostSnapshot, traffic: Traffic, *, tokenizer_bytes: int = 0
) -> Resident | None:
    """Resident bytes of a run's process at their highest.

    Args:
        memory: the run's predicted tensors.
        spec: the run.
        host: the machine that it runs on.
        traffic: what it computes on.
        tokenizer_bytes: of the file of the base's tokenizer.

    Returns:
        None for a run on a card: what the host then holds is small and the driver's affair.
    """
    if spec.device != "cpu":
        return None
    shapes = _shapes(max(spec.layout.micro_batch_tokens, traffic.longest), traffic)
    tokenizer = ResidentRow(
        "tokenizer", TOKENIZER_SHARE * tokenizer_bytes, "measured", "that of SmolLM2, of 3.4 MB, before and after"
    )
    found = {phase.name: (*_rows(phase, spec.recipe, host, shapes), tokenizer) for phase in memory.phases}
    name = max(found, key=lambda name: _total(found[name]))
    return Resident(found[name], name)


def threads_of_products(host: HostSnapshot) -> int:
    """Threads that a worker's products use: what OMP_NUM_THREADS says, or the physical cores."""
    text = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(text) if text.isdigit() and int(text) else host.physical_cores or host.logical_cores


def _shapes(row_tokens: int, traffic: Traffic) -> float:
    """Shapes that products have had by the end of a run, for rows of up to `row_tokens`."""
    rows = _met(-(-row_tokens // TOKEN_STEP), traffic.micro_batches)
    lengths = _met(-(-traffic.longest // ATTENTION_STEP), traffic.samples)
    return SHAPES_OF_ROW_LENGTH * rows + SHAPES_OF_SAMPLE_LENGTH * lengths


def _met(kinds: int, draws: int) -> float:
    """How many of `kinds` that are alike have come after so many draws, on average."""
    return kinds * (1 - (1 - 1 / max(1, kinds)) ** draws)


def _rows(phase: Phase, recipe: Recipe, host: HostSnapshot, shapes: float) -> tuple[ResidentRow, ...]:
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
        size = round(ONEDNN_BYTES_OF_SHAPE * shapes + ONEDNN_BYTES_OF_PRIMITIVE * min(shapes, ONEDNN_PRIMITIVES))
        source = "600 products of different shapes on Zen 5; with AMX they are assumed to be alike"
        rows.append(ResidentRow("oneDNN's products", size, "assumed" if host.flags.amx_bf16 else "measured", source))
    return tuple(rows)


def _total(rows: tuple[ResidentRow, ...]) -> int:
    return sum(row.size_bytes for row in rows)
