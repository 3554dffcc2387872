"""The operations of decoder layers on a tape: what each allocates, keeps and frees, forward and backward.

Each follows the code that runs: transformers' modules, torch's derivatives, edgepeft's frozen linears.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from edgepeft.memory.tape import Node, Tape, Tensor
from edgepeft.methods import LayerTerms, LinearTerms

FLOAT32 = 4
NormStyle = Literal["cast, then gain", "gain, then cast"]
"""Whether the norm's gain is applied in the compute dtype (Llama) or in float32 (Gemma, OLMo 2)."""


class LinearPlan(msgspec.Struct, frozen=True):
    """One linear layer, for one micro-batch."""

    in_bytes: int
    """Of its input."""
    out_bytes: int
    """Of its output."""
    scratch_bytes: int
    """What forming the dense matrix needs beside the shared buffer."""
    update: LinearTerms | None
    """What the method adds; None where the linear is not targeted."""


class Operations:
    """Operations of one micro-batch.

    Args:
        tape: they are done on.
        tokens: of the micro-batch.
        compute_bytes: of an entry in the compute dtype.
        angle_bytes: of the sines and cosines of all positions.
        converts: whether kernels copy what has another dtype before they work on it, as the CPU's do.
    """

    def __init__(self, tape: Tape, tokens: int, compute_bytes: int, angle_bytes: int, *, converts: bool) -> None:
        self.tape = tape
        self.tokens = tokens
        self.compute_bytes = compute_bytes
        self.angles = Tensor(tape, angle_bytes)
        self.converts = converts

    # Any operation -----------------------------------------------------------------------------------------------

    def through(self, x: Tensor, before: int, after: int, *kept: Tensor, keeps: bool = False) -> Tensor:
        """An operation with one input: its result is new, and so is the gradient that goes back.

        Args:
            x: the input.
            before: bytes of it, and of its gradient.
            after: bytes of the result.
            kept: what backward needs.
            keeps: whether it needs something that is there anyway, such as a weight.
        """
        tape = self.tape
        if x.node is None:
            return Tensor(tape, after)

        def back(node: Node) -> list[Tensor | None]:
            g = node.take()
            out = Tensor(tape, before)
            del g
            return [out]

        record = tape.record if kept or keeps else tape.record_plain
        node = record((x.node,), back, *kept)
        return Tensor(tape, after, node)

    def view(self, x: Tensor, gradient_bytes: int) -> Tensor:
        """A view whose gradient is made anew: in another layout, or among the zeros of what was not viewed."""
        tape = self.tape
        if x.node is None:
            return x

        def back(node: Node) -> list[Tensor | None]:
            g = node.take()
            out = Tensor(tape, gradient_bytes)
            del g
            return [out]

        return self.view_of(x, tape.record_plain((x.node,), back))

    def view_of(self, x: Tensor, node: Node) -> Tensor:
        """A view of x, made by `node`."""
        view = Tensor(self.tape, 0, node)
        view.base = x
        return view

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the first and the last half of the columns; their gradients are put together again."""
        tape, size = self.tape, x.size
        if x.node is None:
            return x, x
        waiting: list[Tensor] = []

        def back_last(node: Node) -> list[Tensor | None]:
            waiting.append(node.take())
            return [None]

        def back_first(node: Node) -> list[Tensor | None]:
            g = node.take()
            out = Tensor(tape, size)
            waiting.clear()
            del g
            return [out]

        first = self.view_of(x, tape.record_plain((x.node,), back_first))
        return first, self.view_of(x, tape.record_plain((x.node,), back_last))

    def product(self, a: Tensor, b: Tensor, size: int) -> Tensor:
        """a times b, entry by entry."""
        tape = self.tape
        if a.node is None and b.node is None:
            return Tensor(tape, size)

        def back(node: Node) -> list[Tensor | None]:
            g = node.take()
            first = Tensor(tape, size) if node.inputs[0] is not None else None
            second = Tensor(tape, size) if node.inputs[1] is not None else None
            del g
            return [first, second]

        kept = [x for x, other in ((a, b), (b, a)) if other.node is not None]
        node = tape.record((a.node, b.node), back, *kept)
        return Tensor(tape, size, node)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """a plus b; both get the gradient itself."""
        tape = self.tape
        if a.node is None and b.node is None:
            return Tensor(tape, a.size)

        def back(node: Node) -> list[Tensor | None]:
            g = node.take()
            return [g, g]

        return Tensor(tape, a.size, tape.record_plain((a.node, b.node), back))

    # Parts of a layer --------------------------------------------------------------------------------------------

    def linear(self, x: Tensor, plan: LinearPlan) -> Tensor:
        """`x Wᵀ` plus the update: one node (engine.model.linear)."""
        tape, update = self.tape, plan.update
        tape.touch(plan.scratch_bytes)
        y = Tensor(tape, plan.out_bytes)
        kept = None
        if update is not None:
            kept = Tensor(tape, update.kept_bytes)
            tape.touch(update.forward_bytes)
        if tape.nodes is None or (x.node is None and update is None):
            return y

        def back(node: Node) -> list[Tensor | None]:
            g = node.take()
            grad_x = None
            if node.inputs[0] is not None:
                tape.touch(plan.scratch_bytes)
                grad_x = Tensor(tape, plan.in_bytes)
            if update is None:
                return [grad_x]
            tape.touch(update.backward_bytes)
            trained = Tensor(tape, FLOAT32 * update.parameters)
            del g
            return [grad_x, trained]

        if update is None:
            y.node = tape.record_plain((x.node,), back)
        elif kept is not None:
            saved = (x, kept) if update.keeps_input else (kept,)
            y.node = tape.record((x.node,), back, *saved)
        return y

    def added(self, x: Tensor, terms: LayerTerms) -> Tensor:
        """What a method puts behind a layer, on its residual stream."""
        tape, size = self.tape, x.size
        kept = Tensor(tape, terms.kept_bytes)
        tape.touch(terms.forward_bytes)
        if tape.nodes is None:
            return Tensor(tape, size)

        def back(node: Node) -> list[Tensor | None]:
            g = node.take()
            tape.touch(terms.backward_bytes)
            trained = Tensor(tape, FLOAT32 * terms.parameters)
            grad = Tensor(tape, size) if node.inputs[0] is not None else None
            del g
            return [grad, trained]

        node = tape.record((x.node,), back, kept)
        return Tensor(tape, size, node)

    def norm(self, x: Tensor, size: int, style: NormStyle, *, rows: int = 1, gain_bytes: int = 0) -> Tensor:
        """Root mean square norm in float32.

        Args:
            x: in the compute dtype.
            size: bytes of it.
            style: of its gain.
            rows: vectors of a token that are normalised each by itself; heads, or 1.
            gain_bytes: of a float32 gain that is formed anew and kept (Gemma's 1 + w).
        """
        wide = size // self.compute_bytes * FLOAT32
        h = self.cast(x, size, wide)
        root = self._inverse_root(h, wide, FLOAT32 * self.tokens * rows)
        scaled = self._scaled(h, root, wide)
        del h, root
        if style == "cast, then gain":
            return self.through(self.cast(scaled, wide, size), size, size, keeps=True)
        gain = (Tensor(self.tape, gain_bytes),) if gain_bytes else ()
        scaled = self.through(scaled, wide, wide, *gain, keeps=True)
        return self.cast(scaled, wide, size)

    def cast(self, x: Tensor, before: int, after: int) -> Tensor:
        """From one dtype to another, by their bytes; nothing where they are the same."""
        return x if before == after else self.through(x, before, after)

    def _inverse_root(self, h: Tensor, wide: int, size: int) -> Tensor:
        """rsqrt(mean(h²) + ε) of each row."""
        tape = self.tape
        tape.touch(wide)
        root = Tensor(tape, size)
        if h.node is not None:

            def back(node: Node) -> list[Tensor | None]:
                node.take()
                # The gradient spread over the row, then h, twice it, and that times the gradient.
                spread = Tensor(tape, wide)
                tape.touch(3 * wide)
                del spread
                return [Tensor(tape, wide)]

            root.node = tape.record((h.node,), back, h, root)
        return root

    def _scaled(self, h: Tensor, root: Tensor, wide: int) -> Tensor:
        """h times a factor of its row."""
        tape, size = self.tape, root.size
        if h.node is None:
            return Tensor(tape, wide)

        def back(node: Node) -> list[Tensor | None]:
            g = node.take()
            grad = Tensor(tape, wide)
            tape.touch(wide + size)
            del g
            return [grad, Tensor(tape, size)]

        node = tape.record((h.node, root.node), back, h, root)
        return Tensor(tape, wide, node)
