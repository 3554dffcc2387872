"""Which kernels a tensor gets. Everything in the engine that branches on the device asks here.

A dry run for a card that is not in this machine works on fake CPU tensors: `pretend` makes the engine take the card's
branches for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from edgepeft.memory.target import CPU, Target

Item = TypeVar("Item")

# A plain global: backward on CUDA runs in another thread, which sees neither thread-locals nor context variables.
_pretended: Target | None = None


@contextmanager
def pretend(target: Target) -> Iterator[None]:
    """Lets every tensor inside the block count as one of `target`; for tensors without values only."""
    global _pretended
    before, _pretended = _pretended, target
    try:
        yield
    finally:
        _pretended = before


def target_of(device: torch.device) -> Target:
    """The target that a tensor's device is."""
    if _pretended is not None:
        return _pretended
    return _card(device) if device.type == "cuda" else CPU


def enough(passes: Sequence[Item]) -> Sequence[Item]:
    """The passes of a loop that need memory evenly more, or the same, but for the last: all of them.

    Without values to compute, the first and the last two, whose memory the others stay below. What a pass leaves
    behind must not depend on which came before it.
    """
    return passes if _pretended is None or len(passes) <= 3 else [passes[0], *passes[-2:]]


def one_of(passes: Sequence[Item]) -> Sequence[Item]:
    """The passes of a loop of which none needs more memory than the first, and none leaves any behind: all of them.

    Without values to compute, the first.
    """
    return passes if _pretended is None else passes[:1]


def one_of_each(passes: Sequence[Item], kind: Callable[[Item], Hashable]) -> Sequence[Item]:
    """The passes of a loop whose memory depends on their `kind` alone, and none leaves any behind: all of them.

    Without values to compute, the first of each kind.
    """
    if _pretended is None:
        return passes
    first: dict[Hashable, Item] = {}
    for item in passes:
        first.setdefault(kind(item), item)
    return list(first.values())


def has_values() -> bool:
    """Whether tensors have values; those of a dry run have only sizes."""
    return _pretended is None


def split_points(ascending: Tensor, ends: Sequence[int], size: int) -> list[int]:
    """How many of ascending whole numbers [n], all from 0 to below `size`, lie below each end.

    Without values, as if they were spread evenly.
    """
    if _pretended is not None:
        return [ascending.numel() * end // size for end in ends]
    found: list[int] = torch.searchsorted(ascending, ascending.new_tensor(ends)).tolist()
    return found


def number(scalar: Tensor) -> float:
    """The value of a tensor of one entry; 0 where tensors have no values."""
    return float(scalar) if _pretended is None else 0.0


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`tensor.to`: a copy where the device is another one, be it a card that is only pretended."""
    copied = _pretended is not None and _pretended.kind == "cuda"
    return tensor.to(device, dtype or tensor.dtype, copy=copied)


def dequantize_4bit(packed: Tensor, absmax: Tensor, block: int, out: Tensor) -> None:
    """Writes NF4 data as dense values into `out`, in one launch of bitsandbytes' kernel.

    Args:
        packed: uint8, two codes a byte.
        absmax: float32, one a block.
        block: entries of a block.
        out: contiguous; its shape and dtype are those of the matrix.
    """
    if _pretended is not None:
        # bitsandbytes' own fake kernel compares a torch.Size with a list and refuses; it would write in place, too.
        out.zero_()
        return
    torch.ops.bitsandbytes.dequantize_4bit.out(packed, absmax, block, "nf4", out.shape, out.dtype, out=out)


def fused_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of one sample through the memory-efficient kernel where the device has it.

    Args:
        query: [1, heads, tokens, head_dim].
        key: of the same shape.
        value: [1, heads, tokens, value_dim].
        scale: factor of the scores.
    """
    if _pretended is not None and _pretended.kind == "cuda":
        # By its device, a fake CPU tensor would get the CPU's kernel.
        kernel: Any = torch.ops.aten._scaled_dot_product_efficient_attention.default
        out: Tensor = kernel(query, key, value, None, query.requires_grad, is_causal=True, scale=scale)[0]
        return out
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)


@functools.cache
def _card(device: torch.device) -> Target:
    # ROCm has its own attention kernels and none of those for packed rows.
    capability = (0, 0) if torch.version.hip is not None else torch.cuda.get_device_capability(device)
    return Target("cuda", capability)
