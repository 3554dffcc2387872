"""Keys and values before every sample, on a tape (engine.training.attention, engine.methods.prefix)."""

from __future__ import annotations

import msgspec

from edgepeft.memory.operations import FLOAT32, Operations
from edgepeft.memory.tape import Node, Tensor
from edgepeft.methods import PrefixTerms

_INT64 = 8


class PrefixPlan(msgspec.Struct, frozen=True):
    """What stands before the samples of one micro-batch in each layer."""

    terms: PrefixTerms
    samples: int
    """Of the row, what fills it up included."""
    key_bytes: int
    """Of all keys of one token, in the compute dtype; values alike."""


def put_before(ops: Operations, k: Tensor, v: Tensor, plan: PrefixPlan) -> tuple[Tensor, Tensor]:
    """All keys and values of a row: those before each sample, then its own."""
    if ops.places is None:
        # Made in the first layer, kept to the end of the micro-batch.
        ops.places = Tensor(ops.tape, _INT64 * (ops.tokens + plan.samples * plan.terms.tokens))
    keys, values = _made(ops, plan.terms)
    return _joined(ops, k, keys, plan), _joined(ops, v, values, plan)


def _made(ops: Operations, terms: PrefixTerms) -> tuple[Tensor | None, Tensor | None]:
    """Keys and values that a network makes; None where they are trained as they are."""
    if not terms.width:
        return None, None
    tape, size = ops.tape, FLOAT32 * terms.entries
    hidden = Tensor(tape, FLOAT32 * terms.tokens * terms.width)
    keys, values = Tensor(tape, size), Tensor(tape, size)
    if tape.nodes is None:
        return keys, values
    waiting: list[Tensor] = []

    def back(node: Node) -> list[Tensor | None]:
        g = node.take()
        own = Tensor(tape, FLOAT32 * terms.parameters)
        through = Tensor(tape, FLOAT32 * terms.tokens * terms.width)
        shared = Tensor(tape, FLOAT32 * terms.shared)
        if ops.shared_gradients is None:
            # What all layers share is given its gradient when that of the first layer is there; until then they are
            # added up.
            ops.shared_gradients = shared
        waiting.clear()
        del g, through, shared
        return [own]

    def wait(node: Node) -> list[Tensor | None]:
        waiting.append(node.take())
        return [None]

    node = tape.record((), back, hidden)
    keys.node = tape.record_plain((node,), lambda slot: [slot.take()])
    values.node = tape.record_plain((node,), wait)
    return keys, values


def _joined(ops: Operations, own: Tensor, before: Tensor | None, plan: PrefixPlan) -> Tensor:
    """One operation; `before` is None where it is a trained tensor."""
    tape, entries = ops.tape, plan.terms.entries
    own_bytes, ahead = ops.tokens * plan.key_bytes, plan.terms.tokens * plan.key_bytes
    out = Tensor(tape, own_bytes + plan.samples * ahead)
    # The few in the compute dtype.
    tape.touch(0 if ops.compute_bytes == FLOAT32 else ahead)
    if tape.nodes is None:
        return out

    def back(node: Node) -> list[Tensor | None]:
        g = node.take()
        grad = Tensor(tape, own_bytes) if node.inputs[0] is not None else None
        parts = Tensor(tape, plan.samples * ahead)
        grad_before = Tensor(tape, FLOAT32 * entries)
        del g, parts
        return [grad, grad_before]

    # What follows the gradients of inputs is that of a trained tensor.
    out.node = tape.record_plain((own.node,) if before is None else (own.node, before.node), back)
    return out
