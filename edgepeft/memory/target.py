"""The device that a prediction is for, and which of the engine's kernels it gets."""

from __future__ import annotations

from typing import Literal

import msgspec

from edgepeft.spec import ComputeDtype

DeviceKind = Literal["cpu", "cuda"]
Attention = Literal["blocks", "varlen", "by sample"]
"""How packed rows are attended to: our own blocks of query rows, the flash kernel for packed rows, or the
memory-efficient kernel sample by sample."""

VARLEN_CAPABILITY = (8, 0)
"""Compute capability from which the flash kernel for packed rows exists (torch.nn.attention.varlen)."""


class Target(msgspec.Struct, frozen=True):
    """A device, as far as memory depends on it."""

    kind: DeviceKind
    """On `cpu` the ledger is live tensor bytes; on `cuda` it is what the card has to hold."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability; None stands for Ampere or newer."""
    expandable_segments: bool = True
    """Whether the CUDA allocator grows its segments; Windows has no such mode."""

    def attention(
        self,
        head_dim: int,
        compute_dtype: ComputeDtype,
        *,
        softcap: bool = False,
        windowed: bool = False,
        prefixed: bool = False,
    ) -> Attention:
        """The kernel that packed attention takes here.

        Args:
            head_dim: entries of a head; queries, keys and values alike.
            compute_dtype: of the products.
            softcap: whether scores are capped softly (Gemma 2).
            windowed: whether a sliding window is shorter than the longest sample.
            prefixed: whether keys stand before every sample.
        """
        if self.kind == "cpu" or softcap:
            return "blocks"
        newest = self.capability is None or self.capability >= VARLEN_CAPABILITY
        # The backward for 193 to 224 entries is missing on consumer cards.
        if newest and compute_dtype != "fp32" and head_dim % 8 == 0 and (head_dim <= 192 or 224 < head_dim <= 256):
            return "varlen"
        # The memory-efficient kernel wants as many keys as queries.
        return "blocks" if windowed or prefixed else "by sample"


CPU = Target("cpu")
"""The processor."""
