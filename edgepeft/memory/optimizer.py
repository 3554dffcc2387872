"""What an optimizer keeps for each trained tensor: two moments, in float32 or in blocks of 8 bit with their scales."""

from __future__ import annotations

import math
from collections.abc import Iterable

from edgepeft.spec import OptimizerName

FLOAT32 = 4
LEAST_8BIT = 4096
"""Entries from which bitsandbytes keeps a tensor's moments in 8 bit; smaller ones stay in float32."""
BLOCK_8BIT = 256
"""Consecutive 8-bit entries that share one float32 scale (Dettmers et al. 2021, arXiv 2110.02861, section 2)."""
MAPS_8BIT_BYTES = 2 * 256 * FLOAT32
"""The 8-bit types' values, signed and unsigned, which all tensors share."""


def state_bytes(name: OptimizerName, sizes: Iterable[int]) -> int:
    """Bytes of the optimizer's states over trained tensors.

    Args:
        name: of the optimizer.
        sizes: entries of each tensor.
    """
    sizes = list(sizes)
    if name == "adamw":
        # Two moments of every entry, and the step of every tensor.
        return FLOAT32 * (2 * sum(sizes) + len(sizes))
    small = [size for size in sizes if size < LEAST_8BIT]
    large = [size for size in sizes if size >= LEAST_8BIT]
    scales = sum(math.ceil(size / BLOCK_8BIT) for size in large)
    return 2 * FLOAT32 * sum(small) + 2 * (sum(large) + FLOAT32 * scales) + (MAPS_8BIT_BYTES if large else 0)
