"""What a card holds that no dry run shows: named rows, each with where its figure comes from.

A dry run follows tensors. The driver's context, libraries' workspaces and the scratch inside fused kernels are no
tensors there. Rows that torch's caching allocator hands out count in *allocated* and *reserved*; the others only in
what the driver says is used. torch's fused AdamW has no scratch, bitsandbytes' scales are tensors that a dry run shows,
and one process on one card needs nothing of NCCL.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from edgepeft.memory.breakdown import Category
from edgepeft.memory.target import DeviceKind, Target
from edgepeft.units import MIB

Provenance = Literal["measured", "published", "assumed"]
"""Measured by this project, stated or measured by others at the named place, or neither."""
Capability = tuple[int, int]


class Unseen(msgspec.Struct, frozen=True):
    """One thing that takes memory and is no tensor of the engine."""

    name: str
    category: Category
    """Where the ledger counts it."""
    size_bytes: int
    provenance: Provenance
    source: str
    """Where the figure is from, or why it is assumed."""
    in_allocator: bool
    """Whether torch's caching allocator hands it out, so that its counters include it."""
    kind: DeviceKind = "cuda"
    capability_from: Capability = (0, 0)
    """Least compute capability that has it."""
    capability_below: Capability | None = None
    """First compute capability that has it no more; None means all later ones have it."""

    def is_on(self, target: Target) -> bool:
        """Whether a device has it; a card of unknown capability counts as Ampere."""
        capability = target.capability or (8, 0)
        below = self.capability_below is None or capability < self.capability_below
        return self.kind == target.kind and self.capability_from <= capability and below


CUBLAS_WORKSPACE_BYTES = (2 * 4096 + 8 * 16) * 1024
"""torch's default, CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8."""
CUBLAS_WORKSPACE_HOPPER_BYTES = 32 * MIB
CUBLAS_HANDLES = 2
"""A thread has its own: the one that runs forward, and autograd's, which runs backward."""
_CUBLAS_SOURCE = (
    "torch 2.13, ATen/cuda/CublasHandlePool.cpp: one for each handle and stream; cuBLASLt shares it unless "
    "TORCH_CUBLASLT_UNIFIED_WORKSPACE=0"
)
TABLE: tuple[Unseen, ...] = (
    Unseen(
        "CUDA context",
        "device context",
        426 * MIB,
        "published",
        "nvidia-smi after the first call, torch 2.10 with CUDA 13 on an RTX 6000 Ada (unslothai/unsloth-zoo pull "
        "request 1053); older drivers less: 272 MiB with torch 1.13 (pytorch/pytorch pull request 86509)",
        in_allocator=False,
    ),
    Unseen(
        "kernels' code",
        "device context",
        64 * MIB,
        "assumed",
        "CUDA loads a kernel when it is first used (CUDA_MODULE_LOADING=LAZY); a training step uses some hundred",
        in_allocator=False,
    ),
    Unseen(
        "cuBLAS workspaces",
        "workspace",
        CUBLAS_HANDLES * CUBLAS_WORKSPACE_BYTES,
        "published",
        _CUBLAS_SOURCE,
        in_allocator=True,
        capability_below=(9, 0),
    ),
    Unseen(
        "cuBLAS workspaces (Hopper)",
        "workspace",
        CUBLAS_HANDLES * CUBLAS_WORKSPACE_HOPPER_BYTES,
        "published",
        _CUBLAS_SOURCE,
        in_allocator=True,
        capability_from=(9, 0),
        capability_below=(9, 1),
    ),
    Unseen(
        "cuBLAS workspaces (Blackwell)",
        "workspace",
        CUBLAS_HANDLES * CUBLAS_WORKSPACE_BYTES,
        "published",
        _CUBLAS_SOURCE,
        in_allocator=True,
        capability_from=(9, 1),
    ),
)
"""What is there all the time; scratch that comes and goes is computed, see `flash_backward`."""


def unseen(target: Target) -> tuple[Unseen, ...]:
    """The rows of the table that a device has."""
    return tuple(row for row in TABLE if row.is_on(target))


def unseen_bytes(target: Target, *, in_allocator: bool) -> int:
    """What these rows take together, inside torch's allocator or outside of it."""
    return total_bytes(tuple(row for row in unseen(target) if row.in_allocator == in_allocator))


FLASH_ROWS = 128
"""Query rows of the flash kernel's largest block: room behind each sample."""
EFFICIENT_ROWS, EFFICIENT_BLOCKS = 128, 200
"""Rows of a block of the memory-efficient kernel, and the blocks that it wants at work before it stops splitting."""


def total_bytes(rows: tuple[Unseen, ...]) -> int:
    """What rows take together."""
    return sum(row.size_bytes for row in rows)


def flash_backward(
    *,
    tokens: int,
    samples: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    compute_bytes: int,
    keys: int | None = None,
) -> tuple[Unseen, ...]:
    """Scratch of the flash kernel for packed rows, beside the gradients that it returns; one layer at a time.

    Args:
        tokens: of the micro-batch.
        samples: in it.
        heads: of the queries.
        kv_heads: of keys and values.
        head_dim: entries of a head.
        compute_bytes: bytes of an entry in the compute dtype.
        keys: of the micro-batch; None where there are as many as tokens.
    """
    rows = tokens + FLASH_ROWS * samples
    step = 32 if head_dim <= 128 else 64
    padded = -(-head_dim // step) * step

    def row(name: str, size_bytes: int) -> Unseen:
        return Unseen(name, "recomputed layer", size_bytes, "published", source, in_allocator=True)

    source = "torch 2.13, ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_varlen_bwd"
    scratch = [
        row("flash attention: gradient of the queries in float32", 4 * rows * heads * padded),
        row("flash attention: row sums", 4 * rows * heads),
    ]
    if heads != kv_heads:
        size_bytes = 2 * compute_bytes * (tokens if keys is None else keys) * heads * head_dim
        scratch.append(row("flash attention: gradients of keys and values before heads are summed", size_bytes))
    return tuple(scratch)


def efficient_backward(*, tokens: int, heads: int, head_dim: int) -> tuple[Unseen, ...]:
    """Scratch of the memory-efficient kernel, for one sample of so many tokens."""
    entries = tokens * head_dim + tokens
    if head_dim > 64:
        # Sums for keys and values no longer stay in registers; the kernel splits keys only while it lacks work.
        entries += 2 * min(tokens, EFFICIENT_ROWS * max(1, EFFICIENT_BLOCKS // heads)) * head_dim
    return (
        Unseen(
            "memory-efficient attention: sums in float32",
            "recomputed layer",
            4 * heads * entries,
            "assumed",
            "read from torch's mem_eff_attention/kernel_backward.h, without its rounding to blocks; one sample at once",
            in_allocator=True,
        ),
    )
