"""What to do when memory runs out: the same work again, in a smaller layout."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import msgspec
import torch

from edgepeft.data.packing import pack
from edgepeft.methods import LoraConfig, method_of
from edgepeft.spec import Layout, Recipe

_SMALLEST_CHUNK = 16
_SIGNS = (
    "DefaultCPUAllocator",
    "not enough memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out: CUDA's own error, or a plain RuntimeError of an allocator."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)


def is_device_failure(error: BaseException) -> bool:
    """Whether `error` comes from a card or its driver: an illegal access, a lost device, an ECC error."""
    return isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))


def smaller_layout(layout: Layout, tokens: int, samples: int, *, card: bool = False) -> tuple[Layout, str] | None:
    """The next smaller layout and what changed in words; None when there is none left.

    Args:
        layout: the one in which memory ran out.
        tokens: of the micro-batch in which it ran out.
        samples: of it.
        card: whether it ran out in training on a card, beside which the host's RAM can hold what layers keep.
    """
    if samples > 1:
        # A cap above what was really in the micro-batch would change nothing.
        cap = max(1, min(layout.micro_batch_tokens, tokens) // 2)
        return msgspec.structs.replace(layout, micro_batch_tokens=cap), f"micro-batches of at most {cap} tokens"
    if layout.checkpointing == "none":
        return msgspec.structs.replace(layout, checkpointing="layer"), "activation checkpointing switched on"
    if layout.checkpointing == "layer" and card:
        return msgspec.structs.replace(layout, checkpointing="offload"), "inputs of layers kept in the host's RAM"
    if layout.loss_chunk_tokens > _SMALLEST_CHUNK:
        chunk = max(_SMALLEST_CHUNK, layout.loss_chunk_tokens // 4)
        return msgspec.structs.replace(layout, loss_chunk_tokens=chunk), f"loss in chunks of {chunk} tokens"
    return None


def largest_group(lengths: Sequence[int], micro_batch_tokens: int) -> tuple[int, int]:
    """Tokens and samples of the largest micro-batch of a step; zeros for a step without samples.

    Args:
        lengths: tokens of each sample of the step.
        micro_batch_tokens: the layout's cap.
    """
    groups = [[lengths[index] for index in group] for group in pack(lengths, micro_batch_tokens)]
    return max(((sum(group), len(group)) for group in groups), default=(0, 0))


def what_would_help(tokens: int, recipe: Recipe) -> str:
    """What to change where not even one sample of `tokens` fits in the smallest layout."""
    base = "" if recipe.precision == "nf4" else ", or a base in nf4 with --precision nf4"
    if method_of(recipe.method).needs_dense_base:
        base = ", or an adapter alone with --method lora"
    method = recipe.method
    smaller = f", with a rank smaller than {method.rank}" if isinstance(method, LoraConfig) and method.rank > 1 else ""
    return f"Resume when more memory is free, or train with --max-seq-len {max(1, tokens // 2)}{smaller}{base}"


def first_line(error: BaseException) -> str:
    """What an error says, without the trace that some allocators append."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def release_memory() -> None:
    """Gives back what the failed attempt left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
