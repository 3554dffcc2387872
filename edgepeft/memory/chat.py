"""What a chat needs: the base, its adapters, and the keys and values of the conversation."""

from __future__ import annotations

from edgepeft.memory.breakdown import Breakdown, Phase
from edgepeft.memory.estimate import DeviceKind, on_device, workspace_bytes
from edgepeft.memory.weights import ELEMENT_BYTES, base_bytes
from edgepeft.models.shape import ModelShape
from edgepeft.spec import ComputeDtype, Precision


def kv_cache_bytes(shape: ModelShape, tokens: int, compute_dtype: ComputeDtype) -> int:
    """Keys and values of every layer for a conversation of that many tokens."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * tokens * ELEMENT_BYTES[compute_dtype]


def estimate_chat(
    shape: ModelShape,
    precision: Precision,
    compute_dtype: ComputeDtype,
    *,
    context_tokens: int,
    device_kind: DeviceKind,
    adapter_parameters: int = 0,
    batch: int = 1,
) -> Breakdown:
    """Predicts the memory of a chat process.

    Args:
        shape: the base.
        precision: how the base is held.
        compute_dtype: dtype of products and of the cache.
        context_tokens: longest conversation, answers included.
        device_kind: see `estimate_training`.
        adapter_parameters: entries of all loaded adapters together, float32.
        batch: conversations answered at one time.
    """
    base = base_bytes(shape, precision, compute_dtype)
    c = ELEMENT_BYTES[compute_dtype]
    ledger = dict(base)
    ledger["adapter weights"] = 4 * adapter_parameters
    ledger["KV cache"] = batch * kv_cache_bytes(shape, context_tokens, compute_dtype)
    ledger["workspace"] = workspace_bytes(shape, precision, compute_dtype)
    # The prompt goes through a layer at once; logits exist for one position a conversation.
    ledger["recomputed layer"] = c * context_tokens * (shape.hidden + 3 * shape.intermediate)
    ledger["logits and loss"] = batch * shape.vocab * (c + 4)
    return Breakdown((Phase("chat", on_device(ledger, base, device_kind)),))
