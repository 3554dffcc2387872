"""Decoder layers on a tape: for each family the order in which transformers' code makes, names and drops tensors.

References are dropped where that code drops them: a name is given anew, a call returns, a temporary has been used. What
a caller passes lives until the call returns, so no function here gives a parameter's name anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from edgepeft.memory.attention import AttentionPlan, attend
from edgepeft.memory.experts import ExpertsPlan, experts
from edgepeft.memory.operations import LinearPlan, Operations
from edgepeft.memory.prefix import PrefixPlan, put_before
from edgepeft.memory.rotary import partly_rotated, rotated
from edgepeft.memory.tape import Tensor
from edgepeft.methods import BranchTerms, LinearTerms


class LayerPlan(msgspec.Struct, frozen=True):
    """One decoder layer, for one micro-batch."""

    linears: Mapping[str, LinearPlan]
    """By the last part of their names."""
    attention: AttentionPlan
    hidden_bytes: int
    """Of the residual stream of the micro-batch."""
    query_bytes: int
    """Of all its queries."""
    key_bytes: int
    """Of all keys; values alike."""
    inner_bytes: int
    """Of one branch of the MLP."""
    gain_bytes: int
    """Of a gain that a norm forms anew, a float32 for each of the width's entries; 0 where none does."""
    shared_attention: LinearTerms | None = None
    """Of the update that does the work of queries', keys' and values' linears; None where each has its own or none."""
    shared_mlp: LinearTerms | None = None
    """The same for gate and up."""
    head_gain_bytes: int = 0
    """The same for a norm over one head."""
    query_gain_bytes: int = 0
    """The same for a norm over all queries of a token."""
    key_gain_bytes: int = 0
    """The same for one over all keys."""
    head_norms: bool = False
    """Whether queries and keys are normalised head by head."""
    rotary_share: float = 1.0
    """Share of a head that is rotated."""
    rotates_in_float32: bool = False
    """Whether queries and keys are rotated in float32 (OLMo)."""
    scales_queries: bool = False
    """Whether rotated queries are multiplied by a factor of their position (Ministral 3)."""
    scales_branches: bool = False
    """Whether each branch is multiplied by a number before it meets the residual (Granite)."""
    experts: ExpertsPlan | None = None
    """In place of the MLP, or beside a shared one; None where there are none."""
    after_attention: BranchTerms | None = None
    """What the method puts behind attention; None where it is nothing."""
    after_mlp: BranchTerms | None = None
    """The same for the MLP."""
    trains_gains: bool = False
    """Whether the method trains the gains of norms."""
    prefix: PrefixPlan | None = None
    """What the method puts before the keys and values of every sample; None where it is nothing."""

    def hidden_norm(self, ops: Operations, x: Tensor) -> Tensor:
        """A norm over the residual stream."""
        return self.norm(ops, x, self.hidden_bytes, gain_bytes=self.gain_bytes)

    def norm(self, ops: Operations, x: Tensor, size: int, *, rows: int = 1, gain_bytes: int = 0) -> Tensor:
        """Any norm of the layer; see `Operations.norm`."""
        entries = size // (ops.compute_bytes * ops.tokens * rows) if self.trains_gains else 0
        return ops.norm(x, size, rows=rows, gain_bytes=gain_bytes, trained=entries)


Program = Callable[[Operations, LayerPlan, Tensor], Tensor]


def llama(ops: Operations, plan: LayerPlan, x: Tensor) -> Tensor:
    """Norms before attention and MLP: Llama, Mistral, Qwen, Gemma, SmolLM, Phi-3, Granite."""
    hidden = plan.hidden_norm(ops, x)
    hidden = _attention(ops, plan, hidden)
    hidden = _joined(ops, plan, x, hidden)
    residual = hidden
    hidden = plan.hidden_norm(ops, hidden)
    hidden = _mlp(ops, plan, hidden)
    return _joined(ops, plan, residual, hidden)


def gemma2(ops: Operations, plan: LayerPlan, x: Tensor) -> Tensor:
    """Norms before and after attention and MLP: Gemma 2 and 3."""
    hidden = plan.hidden_norm(ops, x)
    hidden = _attention(ops, plan, hidden)
    hidden = plan.hidden_norm(ops, hidden)
    hidden = ops.add(x, hidden)
    residual = hidden
    hidden = plan.hidden_norm(ops, hidden)
    hidden = _mlp(ops, plan, hidden)
    hidden = plan.hidden_norm(ops, hidden)
    return ops.add(residual, hidden)


def olmo2(ops: Operations, plan: LayerPlan, x: Tensor) -> Tensor:
    """Norms after attention and MLP, and over all queries and all keys: OLMo 2 and 3."""
    hidden = _attention(ops, plan, x, width_norms=True)
    hidden = plan.hidden_norm(ops, hidden)
    hidden = ops.add(x, hidden)
    residual = hidden
    hidden = _mlp(ops, plan, hidden)
    hidden = plan.hidden_norm(ops, hidden)
    return ops.add(residual, hidden)


def _joined(ops: Operations, plan: LayerPlan, residual: Tensor, branch: Tensor) -> Tensor:
    size = plan.hidden_bytes
    return ops.add(residual, ops.through(branch, size, size) if plan.scales_branches else branch)


def _attention(ops: Operations, plan: LayerPlan, x: Tensor, *, width_norms: bool = False) -> Tensor:
    return ops.branch(x, _attended(ops, plan, x, width_norms=width_norms), plan.after_attention)


def _attended(ops: Operations, plan: LayerPlan, x: Tensor, *, width_norms: bool) -> Tensor:
    linears, query, key = plan.linears, plan.query_bytes, plan.key_bytes
    if "qkv_proj" in linears:
        return _fused_attention(ops, plan, x)
    q, k, v = ops.linears(x, [linears[f"{name}_proj"] for name in "qkv"], plan.shared_attention)
    if width_norms:
        q = plan.norm(ops, q, query, gain_bytes=plan.query_gain_bytes)
        k = plan.norm(ops, k, key, gain_bytes=plan.key_gain_bytes)
        q, k = ops.view(q, query), ops.view(k, key)
    elif plan.head_norms and not plan.head_gain_bytes:
        q = plan.norm(ops, q, query, rows=plan.attention.heads)
        k = plan.norm(ops, k, key, rows=plan.attention.kv_heads)
    else:
        q, k = ops.view(q, query), ops.view(k, key)
        if plan.head_norms:
            # After the heads have come in front (Gemma 3).
            q = plan.norm(ops, q, query, rows=plan.attention.heads, gain_bytes=plan.head_gain_bytes)
            k = plan.norm(ops, k, key, rows=plan.attention.kv_heads, gain_bytes=plan.head_gain_bytes)
    q, k = rotated(ops, q, k, (query, key), in_float32=plan.rotates_in_float32)
    if plan.scales_queries:
        q = ops.through(q, query, query, keeps=True)
    out = _attend(ops, plan, q, k, v)
    return ops.linear(out, linears["o_proj"])


def _attend(ops: Operations, plan: LayerPlan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if plan.prefix is None:
        return attend(ops.tape, q, k, v, plan.attention)
    keys, values = put_before(ops, k, v, plan.prefix)
    return attend(ops.tape, q, keys, values, plan.attention)


def _fused_attention(ops: Operations, plan: LayerPlan, x: Tensor) -> Tensor:
    """One projection for queries, keys and values, which are views of its result: Phi-3."""
    qkv = ops.linear(x, plan.linears["qkv_proj"])
    q, k, v = (ops.view(qkv, qkv.size) for _ in range(3))
    q, k = ops.view(q, plan.query_bytes), ops.view(k, plan.key_bytes)
    finish_q, finish_k = (
        partly_rotated(ops, part, size, round(size * plan.rotary_share))
        for part, size in ((q, plan.query_bytes), (k, plan.key_bytes))
    )
    q, k = finish_q(), finish_k()
    out = _attend(ops, plan, q, k, v)
    return ops.linear(out, plan.linears["o_proj"])


def _mlp(ops: Operations, plan: LayerPlan, x: Tensor) -> Tensor:
    return ops.branch(x, _fed_forward(ops, plan, x), plan.after_mlp)


def _fed_forward(ops: Operations, plan: LayerPlan, x: Tensor) -> Tensor:
    linears, inner = plan.linears, plan.inner_bytes
    if plan.experts is not None:
        chosen = experts(ops, x, plan.hidden_bytes, plan.experts)
        return ops.add(chosen, _gated(ops, plan, x)) if "down_proj" in linears else chosen
    if "gate_up_proj" not in linears:
        return _gated(ops, plan, x)
    # One projection for both branches, which are views of its result: Phi-3.
    gate, up = ops.halves(ops.linear(x, linears["gate_up_proj"]))
    up = ops.product(up, ops.through(gate, inner, inner, gate), inner)
    return ops.linear(up, linears["down_proj"])


def _gated(ops: Operations, plan: LayerPlan, x: Tensor) -> Tensor:
    linears, inner = plan.linears, plan.inner_bytes
    gate, up = ops.linears(x, [linears["gate_proj"], linears["up_proj"]], plan.shared_mlp)
    product = ops.product(gate, up, inner)
    del gate, up
    return ops.linear(product, linears["down_proj"])


PROGRAMS: Mapping[str, Program] = {
    "llama": llama,
    "mistral": llama,
    "ministral": llama,
    "ministral3": llama,
    "qwen2": llama,
    "qwen3": llama,
    "gemma": llama,
    "gemma2": gemma2,
    "gemma3_text": gemma2,
    "phi3": llama,
    "smollm3": llama,
    "granite": llama,
    "olmo2": olmo2,
    "olmo3": olmo2,
}
"""By `model_type`: the layers that are followed exactly."""
