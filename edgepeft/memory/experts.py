"""A mixture of experts on a tape, roughly: transformers' grouped products over pairs of a token and an expert.

The experts' fused weights are frozen and get no update; what they compute is kept for the gradient of their input.
"""

from __future__ import annotations

import msgspec

from edgepeft.memory.operations import Operations
from edgepeft.memory.tape import Node, Tensor


class ExpertsPlan(msgspec.Struct, frozen=True):
    """The experts of one layer, for one micro-batch."""

    router_bytes: int
    """Of the probabilities of all experts, float32."""
    index_bytes: int
    """Of a whole number for each pair."""
    pair_hidden_bytes: int
    """Of a row of the residual stream for each pair."""
    pair_inner_bytes: int
    """Of a row inside an expert for each pair."""


def experts(ops: Operations, x: Tensor, size: int, plan: ExpertsPlan) -> Tensor:
    """What the chosen experts make of x.

    Args:
        ops: of the micro-batch.
        x: after the norm.
        size: bytes of it, and of the result.
        plan: of the experts.
    """
    tape, pairs, inner = ops.tape, plan.pair_hidden_bytes, plan.pair_inner_bytes
    probabilities = ops.through(x, size, plan.router_bytes, Tensor(tape, plan.router_bytes))
    order = Tensor(tape, 3 * plan.index_bytes)
    chosen = ops.through(x, size, pairs, order)
    both = ops.through(chosen, pairs, 2 * inner, keeps=True)
    gate, up = ops.halves(both)
    product = ops.product(ops.through(gate, inner, inner, gate), up, inner)
    out = ops.through(product, inner, pairs, keeps=True)
    weighted = _weighted(ops, out, probabilities, pairs)
    restored = ops.through(weighted, pairs, pairs)
    del weighted
    return ops.through(restored, 0, size)


def _weighted(ops: Operations, out: Tensor, weights: Tensor, size: int) -> Tensor:
    """Each pair's row times the weight of its expert."""
    tape = ops.tape
    if out.node is None:
        return Tensor(tape, size)

    def back(node: Node) -> list[Tensor | None]:
        g = node.take()
        grad = Tensor(tape, size)
        tape.touch(size)
        del g
        return [grad, Tensor(tape, weights_bytes)]

    weights_bytes = weights.size
    node = tape.record((out.node, weights.node), back, out, weights)
    return Tensor(tape, size, node)
