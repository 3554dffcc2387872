"""What single operations need inside, which no tensor outside of them shows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from edgepeft.memory.chunks import QUANTIZING_BYTES
from edgepeft.memory.target import Target
from edgepeft.memory.unseen import efficient_backward, flash_backward, total_bytes

_ELEMENTWISE = frozenset({"aten::add", "aten::sub", "aten::mul", "aten::div"})


class ScratchOf:
    """Bytes that an operation allocates and frees before it returns, on one kind of device.

    The CPU's were found by comparing dry runs with the events of its allocator; for a card's see `memory.unseen`.
    """

    def __init__(self, target: Target) -> None:
        self._on_cpu = target.kind == "cpu"

    def __call__(self, operation: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> int:
        """For torch's overload and what it was called with."""
        name = operation._schema.name
        if not self._on_cpu:
            if name == "torch_attn::_varlen_attn_backward":
                return _varlen_backward(*arguments[1:3], offsets=arguments[6])
            if name == "aten::_scaled_dot_product_efficient_attention_backward":
                return _efficient_backward(arguments[1])
            return 0
        if name.rstrip("_") in _ELEMENTWISE:
            return _conversions(operation, arguments, options.get("out"))
        if name == "bitsandbytes::quantize_4bit":
            return _quantizing(arguments[0])
        return 0


def _varlen_backward(query: Tensor, key: Tensor, *, offsets: Tensor) -> int:
    """For queries [tokens, heads, head_dim] and keys [keys, kv_heads, head_dim]."""
    tokens, heads, head_dim = query.shape
    rows = flash_backward(
        tokens=tokens,
        keys=key.shape[0],
        samples=offsets.shape[0] - 1,
        heads=heads,
        kv_heads=key.shape[1],
        head_dim=head_dim,
        compute_bytes=query.element_size(),
    )
    return total_bytes(rows)


def _efficient_backward(query: Tensor) -> int:
    """For queries [1, heads, tokens, head_dim] of one sample, whose keys have as many heads."""
    _, heads, tokens, head_dim = query.shape
    return total_bytes(efficient_backward(tokens=tokens, heads=heads, head_dim=head_dim))


def _quantizing(source: Tensor) -> int:
    """bitsandbytes' quantize_4bit has no kernel for the CPU: it is made of operations on float32."""
    return round(QUANTIZING_BYTES[source.element_size()] * source.numel())


def _conversions(operation: Any, arguments: tuple[Any, ...], out: Tensor | None) -> int:
    """Copies in the common dtype of what has another one: the CPU's element-wise kernels work on one dtype alone."""
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    if len({tensor.dtype for tensor in tensors}) < 2 and (out is None or out.dtype == tensors[0].dtype):
        return 0
    common = torch.result_type(*tensors[:2]) if len(tensors) > 1 else tensors[0].dtype
    # A single value is converted by itself.
    converted = [tensor for tensor in tensors if tensor.dtype != common and tensor.dim() > 0]
    written = tensors[0] if operation._schema.name.endswith("_") else out
    if written is not None and written.dtype != common and written is not tensors[0]:
        converted.append(written)
    return sum(math.prod(tensor.shape) for tensor in converted) * common.itemsize
