"""What a chat needs: the base, its adapters, and the keys and values of the conversation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from edgepeft.library.peft_config import method_id_of
from edgepeft.memory.assembly import Pass, plan_micro_batch
from edgepeft.memory.breakdown import Breakdown, Category, Phase
from edgepeft.memory.chunks import BATCH_PREFILL, PREFILL_TOKENS
from edgepeft.memory.estimate import on_device, workspace_bytes
from edgepeft.memory.micro_batch import evaluate
from edgepeft.memory.operations import FLOAT32
from edgepeft.memory.target import DeviceKind, Target
from edgepeft.memory.weights import ELEMENT_BYTES, base_bytes
from edgepeft.models.headers import TensorHeader
from edgepeft.models.shape import ModelShape
from edgepeft.spec import ComputeDtype, Precision

_INT32 = 4
_CHECKED = 7
"""Bytes of an entry while it is seen to be finite."""
_CHECKED_ENTRIES = 1 << 20
"""Entries that are looked at together, at the most."""
_BASE_TABLE = ".base_layer.weight"
"""The base's own embedding or head, which PEFT writes beside a LoRA of it: it is compared and let go."""
_LENGTHS_OF_ROWS = 3
"""Of DoRA: those that are trained, those of the base and those of both together."""


class AdapterBytes(msgspec.Struct, frozen=True):
    """What one adapter takes of a chat's memory."""

    held: int
    """Once it is there: matrices in the compute dtype, the rest in float32."""
    reading: int
    """While it is read: the file's tensors, all of them in float32, and what looking for NaN takes;
    without the dense matrix of the base that DoRA and sparse adapters look at, one at a time."""


def adapter_bytes(tensors: Iterable[TensorHeader], compute_dtype: ComputeDtype) -> AdapterBytes:
    """What an adapter takes, told from the header of its weights file.

    Args:
        tensors: of the file.
        compute_dtype: dtype of products.
    """
    held = reading = largest = 0
    for tensor in tensors:
        if tensor.name.endswith(_BASE_TABLE):
            reading += tensor.size_bytes
            continue
        if tensor.dtype.startswith(("I", "U")):
            # Places of a sparse adapter; where the file has rows and columns, one number of both is held.
            own = _INT32 * tensor.entries // (2 if len(tensor.shape) == 2 else 1)
            master = own
        else:
            master = FLOAT32 * tensor.entries * (_LENGTHS_OF_ROWS if "lora_magnitude_vector" in tensor.name else 1)
            matrix = len(tensor.shape) > 1 and min(tensor.shape) > 1
            own = ELEMENT_BYTES[compute_dtype] * tensor.entries if matrix else master
        held += own
        largest = max(largest, tensor.entries)
        reading += tensor.size_bytes + master
    return AdapterBytes(held, reading + _CHECKED * min(largest, _CHECKED_ENTRIES))


def formed_head_bytes(settings: Mapping[str, Any], scale: float, shape: ModelShape, compute_dtype: ComputeDtype) -> int:
    """The output head between the base's and a full adapter's, which is formed when that is used in part.

    Args:
        settings: adapter_config.json.
        scale: the adapter's strength.
        shape: the base.
        compute_dtype: dtype of products.
    """
    if scale in (0, 1) or method_id_of(settings, "adapter_config.json") != "full":
        return 0
    return shape.vocab * shape.hidden * ELEMENT_BYTES[compute_dtype]


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
    adapters: Sequence[AdapterBytes] = (),
    leading_tokens: int = 0,
    batch: int = 1,
) -> Breakdown:
    """Predicts the memory of a chat process: while its last adapter is read, and while it answers.

    Args:
        shape: the base.
        precision: how the base is held.
        compute_dtype: dtype of products and of the cache.
        context_tokens: longest conversation, answers included, behind what adapters put first.
        device_kind: see `estimate_training`.
        adapters: all that are resident, in the order in which they are read.
        leading_tokens: places of the context that active adapters take before each conversation.
        batch: conversations answered at one time.
    """
    context_tokens += leading_tokens
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
    ledger["adapter weights"] = sum(adapter.held for adapter in adapters)
    ledger["KV cache"] = kv_cache_bytes(shape, batch * context_tokens, compute_dtype)
    ledger["workspace"] = workspace_bytes(shape, precision, compute_dtype)
    ledger["saved activations"] = mask + max(forward, copies + 4 * c * shape.hidden * tokens)
    # Logits exist for one position of a conversation, in the compute dtype and in float32.
    ledger["logits and loss"] = batch * shape.vocab * (c + FLOAT32)
    chat = Phase("chat", on_device(ledger, target))
    if not adapters:
        return Breakdown((chat,))
    before = sum(adapter.held for adapter in adapters[:-1])
    reading: dict[Category, int] = {**base, "adapter weights": before + adapters[-1].reading}
    return Breakdown((Phase("load", on_device(reading, target)), chat))
