"""What a chat needs: the base, its adapters, and the keys and values of the conversation."""

from __future__ import annotations

from edgepeft.memory.assembly import Pass, plan_micro_batch
from edgepeft.memory.breakdown import Breakdown, Category, Phase
from edgepeft.memory.chunks import BATCH_PREFILL, PREFILL_TOKENS
from edgepeft.memory.estimate import on_device, workspace_bytes
from edgepeft.memory.micro_batch import evaluate
from edgepeft.memory.operations import FLOAT32
from edgepeft.memory.target import DeviceKind, Target
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
    c, target = ELEMENT_BYTES[compute_dtype], Target(device_kind)
    tokens = min(batch * context_tokens, PREFILL_TOKENS if batch == 1 else PREFILL_TOKENS * BATCH_PREFILL)
    prompt = Pass(precision, compute_dtype, target, (tokens,), 0, 1, training=False)
    forward = sum(evaluate(plan_micro_batch(shape, prompt, None)).by_category)
    # Where keys and values of a layer grow, the old ones live beside the new; queries that share them see copies.
    copies = kv_cache_bytes(shape, batch * context_tokens, compute_dtype) // shape.layers
    if shape.heads != shape.kv_heads:
        copies += copies * shape.heads // shape.kv_heads
    mask = tokens * context_tokens
    ledger: dict[Category, int] = dict(base)
    ledger["adapter weights"] = FLOAT32 * adapter_parameters
    ledger["KV cache"] = kv_cache_bytes(shape, batch * context_tokens, compute_dtype)
    ledger["workspace"] = workspace_bytes(shape, precision, compute_dtype)
    ledger["saved activations"] = mask + max(forward, copies + 4 * c * shape.hidden * tokens)
    # Logits exist for one position of a conversation, in the compute dtype and in float32.
    ledger["logits and loss"] = batch * shape.vocab * (c + FLOAT32)
    return Breakdown((Phase("chat", on_device(ledger, target)),))
