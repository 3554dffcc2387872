"""Attention over packed rows on a tape, by the kernel that a device gets (engine.training.attention)."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from edgepeft.memory.chunks import ATTENTION_ROWS, in_attention_steps
from edgepeft.memory.operations import FLOAT32
from edgepeft.memory.tape import Node, Tape, Tensor
from edgepeft.memory.target import Attention
from edgepeft.memory.unseen import efficient_backward, flash_backward, total_bytes

_BOOL, _INT64 = 1, 8


class AttentionPlan(msgspec.Struct, frozen=True):
    """One layer's attention, for one micro-batch."""

    kernel: Attention
    heads: int
    kv_heads: int
    query_bytes: int
    """Of all queries of one token, in the compute dtype."""
    key_bytes: int
    """Of all keys of one token; values alike."""
    compute_bytes: int
    lengths: tuple[int, ...]
    """Tokens of each sample, the longest first."""
    window: int | None
    """A token sees this many; None means all before it."""
    softcap: bool
    converts: bool
    """Whether kernels copy what has another dtype before they work on it, as the CPU's do."""
    heads_first: bool = False
    """Whether queries come with the heads in front, as a concatenation leaves them."""
    ahead: int = 0
    """Keys before those of each sample."""

    @property
    def tokens(self) -> int:
        """Of the row."""
        return sum(self.lengths)

    @property
    def key_tokens(self) -> int:
        """Keys of the row."""
        return self.tokens + len(self.lengths) * self.ahead

    @property
    def head_dim(self) -> int:
        """Entries of a head."""
        return self.query_bytes // (self.heads * self.compute_bytes)


def attend(tape: Tape, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """The output [T, heads · head_dim]."""
    if plan.kernel == "varlen":
        out = _varlen(tape, q, k, v, plan)
        # It comes in the queries' layout, and what comes after wants tokens in front.
        return _copied(tape, out) if plan.heads_first else out
    if plan.kernel == "by sample":
        return _by_sample(tape, q, k, v, plan)
    return _in_blocks(tape, q, k, v, plan)


def _copied(tape: Tape, x: Tensor) -> Tensor:
    """In another layout; its gradient is passed on."""
    node = None if x.node is None else tape.record_plain((x.node,), lambda node: [node.take()])
    return Tensor(tape, x.size, node)


def _wanted(*tensors: Tensor) -> tuple[Node | None, ...] | None:
    """The nodes of the inputs, or None where no gradient goes through any."""
    nodes = tuple(tensor.node for tensor in tensors)
    return nodes if any(node is not None for node in nodes) else None


def _gradients(tape: Tape, plan: AttentionPlan) -> list[Tensor | None]:
    """Of queries, keys and values."""
    query, key = plan.tokens * plan.query_bytes, plan.key_tokens * plan.key_bytes
    return [Tensor(tape, query), Tensor(tape, key), Tensor(tape, key)]


def _in_blocks(tape: Tape, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    out = Tensor(tape, plan.tokens * plan.query_bytes)
    tape.touch(max(_block_forward(plan, block) for block in _blocks(plan)))
    wanted = _wanted(q, k, v)
    if wanted is not None:

        def back(node: Node) -> list[Tensor | None]:
            # Held to the end of the call.
            g = node.take()
            gradients = _gradients(tape, plan)
            tape.touch(max(_block_backward(plan, block) for block in _blocks(plan)))
            del g
            return gradients

        out.node = tape.record(wanted, back, q, k, v)
    return out


class _Block(NamedTuple):
    """What of a block decides its memory: rows and keys as they are computed, and the keys from its first row on."""

    rows: int
    keys: int
    keys_from_rows: int


def _blocks(plan: AttentionPlan) -> list[_Block]:
    """The blocks of the longest sample that can be its highest point."""
    length = plan.lengths[0]
    found = []
    for begin in range(0, length, ATTENTION_ROWS)[-2:]:
        end = min(begin + ATTENTION_ROWS, length)
        own = begin + plan.ahead
        first = 0 if plan.window is None else max(0, own - plan.window + 1)
        keys = min(in_attention_steps(end + plan.ahead - first), plan.key_tokens)
        found.append(_Block(in_attention_steps(end - begin), keys, keys - (own - first)))
    return found


def _hiding_bytes(plan: AttentionPlan, block: _Block) -> int:
    """The mask of a block."""
    if plan.window is None:
        return block.rows * block.keys_from_rows * plan.compute_bytes
    # Three comparisons' results, two of which become one; positions are int64.
    return 3 * block.rows * block.keys * _BOOL + (2 * block.rows + block.keys) * _INT64


def _score_bytes(plan: AttentionPlan, block: _Block) -> int:
    return plan.compute_bytes * plan.heads * block.rows * block.keys


def _probabilities(plan: AttentionPlan, block: _Block) -> int:
    """The highest point while probabilities are formed, scaled queries included."""
    scores = _score_bytes(plan, block)
    hiding = _hiding_bytes(plan, block)
    scaled = block.rows * plan.query_bytes
    return scaled + (max(3 * scores, 2 * scores + hiding) if plan.softcap else scores + hiding)


def _block_forward(plan: AttentionPlan, block: _Block) -> int:
    return max(_probabilities(plan, block), 2 * block.rows * plan.query_bytes + _score_bytes(plan, block))


def _block_backward(plan: AttentionPlan, block: _Block) -> int:
    scores = _score_bytes(plan, block)
    scaled = block.rows * plan.query_bytes
    keyed = block.keys * plan.key_bytes
    slope = scores if plan.softcap else 0
    several = plan.lengths[0] > ATTENTION_ROWS
    # Sums over blocks are float32.
    longest = plan.lengths[0] + plan.ahead
    sums = 2 * FLOAT32 * longest * plan.key_bytes // plan.compute_bytes if several else 0
    converted = (
        FLOAT32 * keyed // plan.compute_bytes if plan.converts and several and plan.compute_bytes != FLOAT32 else 0
    )
    highest = max(
        _probabilities(plan, block),
        2 * scaled + keyed + 2 * scores + slope,
        2 * scaled + keyed + scores + slope + max(scaled, keyed + converted),
    )
    return sums + highest


def _varlen(tape: Tape, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """The flash kernel keeps its output and the sums of each row."""
    out = Tensor(tape, plan.tokens * plan.query_bytes)
    sums = Tensor(tape, FLOAT32 * plan.heads * plan.tokens)
    wanted = _wanted(q, k, v)
    if wanted is not None:
        scratch = flash_backward(
            tokens=plan.tokens,
            keys=plan.key_tokens,
            samples=len(plan.lengths),
            heads=plan.heads,
            kv_heads=plan.kv_heads,
            head_dim=plan.head_dim,
            compute_bytes=plan.compute_bytes,
        )

        def back(node: Node) -> list[Tensor | None]:
            g = node.take()
            gradients = _gradients(tape, plan)
            tape.touch(total_bytes(scratch))
            del g
            return gradients

        out.node = tape.record(wanted, back, q, k, v, out, sums)
    return out


def _by_sample(tape: Tape, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """The memory-efficient kernel sample by sample; it knows no heads that share keys, so these are repeated."""
    grouped = plan.heads != plan.kv_heads
    parts = [Tensor(tape, plan.tokens * plan.query_bytes), Tensor(tape, FLOAT32 * plan.heads * plan.tokens)]
    repeated = [Tensor(tape, plan.tokens * plan.query_bytes) for _ in range(2)] if grouped else [k, v]
    wanted = _wanted(q, k, v)
    node = None
    if wanted is not None:
        scratch = efficient_backward(tokens=plan.lengths[0], heads=plan.heads, head_dim=plan.head_dim)

        def back(node: Node) -> list[Tensor | None]:
            g = node.take()
            gradients = _gradients(tape, plan)
            tape.touch(total_bytes(scratch))
            del g
            return gradients

        node = tape.record(wanted, back, q, *repeated, *parts)
    return Tensor(tape, plan.tokens * plan.query_bytes, node)
