"""Rotary position embedding on a tape: x cos + rotate_half(x) sin (Su et al. 2021, arXiv 2104.09864)."""

from __future__ import annotations

from collections.abc import Callable

from edgepeft.memory.operations import FLOAT32, Operations
from edgepeft.memory.tape import Node, Tensor


def rotated(
    ops: Operations, q: Tensor, k: Tensor, sizes: tuple[int, int], *, in_float32: bool
) -> tuple[Tensor, Tensor]:
    """Queries and keys, rotated.

    Args:
        ops: of the micro-batch.
        q: queries.
        k: keys.
        sizes: bytes of both.
        in_float32: whether sines and cosines are float32, so that products are, too (OLMo).
    """
    factor = FLOAT32 if in_float32 else ops.compute_bytes
    wide_q, wide_k = (size // ops.compute_bytes * factor for size in sizes)
    turned_q, turned_k = _rotated(ops, q, sizes[0], wide_q), _rotated(ops, k, sizes[1], wide_k)
    return ops.cast(turned_q, wide_q, sizes[0]), ops.cast(turned_k, wide_k, sizes[1])


def partly_rotated(ops: Operations, x: Tensor, size: int, part: int) -> Callable[[], Tensor]:
    """Heads of which the first part is rotated and put together with the rest again (Phi-3).

    Both parts are cut off at once; the rest happens when the result is called.

    Args:
        ops: of the micro-batch.
        x: a view.
        size: bytes of it.
        part: bytes of the part that is rotated.
    """
    tape = ops.tape
    waiting: list[Tensor] = []
    cut = None
    if x.node is not None:

        def back_cut(node: Node) -> list[Tensor | None]:
            turned = node.take()
            rest = Tensor(tape, size)
            waiting.clear()
            if part < size:
                among_zeros = Tensor(tape, size)
                turned = among_zeros
                del among_zeros
            whole = Tensor(tape, size)
            del turned, rest
            return [whole]

        cut = tape.record_plain((x.node,), back_cut)

    def finish() -> Tensor:
        direct, turned = _products(ops, part, part)
        node = None
        if cut is not None:

            def back(node: Node) -> list[Tensor | None]:
                # The gradient of the rest is a view of it.
                waiting.append(node.take())
                through_sine = _unrotated(ops, part, part)
                straight = Tensor(tape, part)
                whole = Tensor(tape, part)
                del through_sine, straight
                return [whole]

            node = tape.record((cut,), back, ops.angles)
        both = Tensor(tape, part)
        del direct, turned
        out = Tensor(tape, size, node)
        del both
        return out

    return finish


def _rotated(ops: Operations, x: Tensor, size: int, wide: int) -> Tensor:
    tape = ops.tape
    direct, turned = _products(ops, size, wide)
    node = None
    if x.node is not None:

        def back(node: Node) -> list[Tensor | None]:
            g = node.take()
            through_sine = _unrotated(ops, size, wide)
            straight = _times_angle(ops, size, wide)
            del g
            whole = Tensor(tape, size)
            del through_sine, straight
            return [whole]

        node = tape.record((x.node,), back, ops.angles)
    out = Tensor(tape, wide, node)
    del direct, turned
    return out


def _products(ops: Operations, size: int, wide: int) -> tuple[Tensor, Tensor]:
    """x cos and rotate_half(x) sin."""
    tape = ops.tape
    copied = wide if ops.converts and wide != size else 0
    direct = Tensor(tape, wide)
    tape.touch(copied)
    exchanged = Tensor(tape, size)
    tape.touch(size // 2)
    turned = Tensor(tape, wide)
    tape.touch(copied)
    del exchanged
    return direct, turned


def _unrotated(ops: Operations, size: int, wide: int) -> Tensor:
    """The gradient that comes through the sine and the exchange of halves."""
    tape = ops.tape
    parts = _times_angle(ops, size, wide)
    negated = Tensor(tape, size // 2)
    first = Tensor(tape, size)
    del negated
    second = Tensor(tape, size)
    del parts
    both = Tensor(tape, size)
    del first, second
    return both


def _times_angle(ops: Operations, size: int, wide: int) -> Tensor:
    """A gradient of `wide` bytes times a sine or a cosine, brought back to `size`."""
    product = Tensor(ops.tape, wide)
    return product if wide == size else Tensor(ops.tape, size)
