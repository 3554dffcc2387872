"""Bytes that one decoder layer needs, derived from what each module of it keeps for its backward.

The modules are those of transformers' Llama family: pre-norm RMSNorm computed in float32, rotary attention over packed
rows, a gated MLP, linears as one autograd function. In the comments c is the bytes of an entry in the compute dtype, H
the hidden width, I the inner width, Q and K the widths of all query heads and of all key heads.
"""

from __future__ import annotations

import msgspec

from edgepeft.methods import MethodConfig, method_of
from edgepeft.models.shape import ModelShape

FLOAT32 = 4
ATTENTION_ROWS = 256
"""Query rows whose scores exist at one time in the CPU's attention backward."""


class LayerActivations(msgspec.Struct, frozen=True):
    """Bytes of one decoder layer for a micro-batch."""

    saved: int
    """Kept from the layer's forward to its backward, without the layer's input."""
    backward: int
    """Alive beside that at the highest point of its backward, negative where parts of `saved` are gone by then."""
    forward: int
    """Highest point of a forward that keeps nothing, without the layer's input."""


def layer_activations(
    shape: ModelShape, method: MethodConfig, compute_bytes: int, *, tokens: int, longest_sample: int, on_cpu: bool
) -> LayerActivations:
    """The terms of one layer of `shape` under `method`.

    Args:
        shape: the model.
        method: what is trained beside its linears.
        compute_bytes: bytes of an entry in the compute dtype.
        tokens: tokens of the micro-batch.
        longest_sample: tokens of the longest sample in it; attention is quadratic in nothing else.
        on_cpu: whether attention runs through the CPU's block backward, which forms scores, or a fused kernel.
    """
    c, hidden, inner = compute_bytes, shape.hidden, shape.intermediate
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = max(2, round(shape.norm_parameters / hidden))
    # A norm keeps its float32 input and the inverse root; the linears after it keep its output, once for all of them.
    norm = FLOAT32 * hidden + FLOAT32
    saved_norms = norms * norm + 2 * c * hidden
    if shape.norm_parameters % hidden:  # norms over each head's queries and keys (Qwen3, Gemma 3)
        saved_norms += FLOAT32 * (query + key)
    # Rotated queries and keys, values, and the output, which o_proj keeps.
    saved_attention = c * (2 * query + 2 * key) + (0 if on_cpu else FLOAT32 * shape.heads)
    # The gate before and after its activation, the other branch, and their product, which down_proj keeps.
    saved_mlp = 4 * c * inner
    kept = method_of(method).kept_bytes_per_token(method, shape, c)
    saved = saved_norms + saved_attention + saved_mlp + kept
    # In the MLP's backward the gradients of the product and of both branches meet, beside the residual's.
    mlp_backward = 2 * c * inner + c * hidden
    # In the attention's backward the MLP's part and the second norm's are gone; four gradients meet.
    attention_backward = c * (query + 2 * key + hidden) - saved_mlp - norm - c * hidden
    scores = _score_bytes(c * shape.heads, longest_sample) + 2 * FLOAT32 * key * longest_sample if on_cpu else 0
    # In a forward without gradients: the layer's residual and the norm's output beside three branches of the MLP, or
    # beside queries, keys, values and their rotated copies, or beside a norm's float32 copies.
    branches = max(3 * c * inner, c * (3 * query + 3 * key), 2 * FLOAT32 * hidden)
    forward = 2 * c * hidden + branches
    return LayerActivations(
        saved=round(tokens * saved),
        backward=round(max(tokens * mlp_backward, tokens * attention_backward + scores)),
        forward=round(tokens * forward),
    )


def _score_bytes(row_bytes: int, longest_sample: int) -> int:
    """Scores of a block of query rows in the CPU's attention backward: probabilities and two gradients.

    Those of one block live until the next block, which sees more keys, has made its scores and probabilities.
    """
    rows = min(ATTENTION_ROWS, longest_sample)
    blocks = max(3 * longest_sample, 3 * (longest_sample - rows) + 2 * longest_sample)
    return row_bytes * rows * blocks
