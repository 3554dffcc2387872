"""The operations of decoder layers on a tape: what each allocates, keeps and frees, forward and backward.

Each follows the code that runs: transformers' modules, torch's derivatives, edgepeft's frozen linears, norms and gates.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from edgepeft.memory.chunks import ELEMENTWISE_CHUNK
from edgepeft.memory.tape import GRADIENTS, Node, Tape, Tensor
from edgepeft.methods import BranchTerms, LinearTerms

FLOAT32 = 4


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
    ends_layer: bool = False
    """Whether nothing but a sum uses its result, so that a layer that runs again does without it."""


class Operations:
    """Operations of one micro-batch.

    Args:
        tape: they are done on.
        tokens: of the micro-batch.
        compute_bytes: of an entry in the compute dtype.
        angle_bytes: of the sines and cosines of all positions.
        converts: whether kernels copy what has another dtype before they work on it, and norms go through a
            micro-batch piece by piece, as on the CPU.
    """

    def __init__(self, tape: Tape, tokens: int, compute_bytes: int, angle_bytes: int, *, converts: bool) -> None:
        self.tape = tape
        self.tokens = tokens
        self.compute_bytes = compute_bytes
        self.angles = Tensor(tape, angle_bytes)
        self.places: Tensor | None = None
        """Where keys lie, once something stands before each sample (memory.prefix)."""
        self.shared_gradients: Tensor | None = None
        """Of what makes keys and values in every layer."""
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

    def look_up(self, size: int, table_bytes: int) -> Tensor:
        """Rows of a trained float32 table in the compute dtype: one node (engine.model.tables).

        Args:
            size: bytes of them.
            table_bytes: of a gradient that the table has not got yet.
        """
        tape = self.tape
        wide = 0 if self.compute_bytes == FLOAT32 else FLOAT32 * size // self.compute_bytes
        rows = Tensor(tape, wide)
        out = Tensor(tape, size)
        del rows
        if tape.nodes is None:
            return out

        def back(node: Node) -> list[Tensor | None]:
            g = node.take()
            own = Tensor(tape, table_bytes)
            tape.rename(own, GRADIENTS)
            tape.touch(wide)
            del g
            return [own]

        out.node = tape.record_plain((), back)
        return out

    def add_rows(self, rows: Tensor, rank: int, vocabulary: int, hidden: int, *, alone: bool) -> Tensor:
        """Rows of a frozen table, and a trained low-rank product for their ids: one node (engine.methods.lora_tables).

        Args:
            rows: of the table.
            rank: of the product.
            vocabulary: entries of its longer factor for each of the rank.
            hidden: the same of the other one.
            alone: whether the longer factor has no gradient yet.
        """
        tape, c = self.tape, self.compute_bytes
        low = 0 if c == FLOAT32 else c
        copy, wide = low * rank * hidden, FLOAT32 * rank * self.tokens
        inner = Tensor(tape, c * rank * self.tokens)
        tape.touch(max(wide if low else 0, copy + rows.size, 2 * rows.size))
        out = Tensor(tape, rows.size)
        if tape.nodes is None:
            return out

        def back(node: Node) -> list[Tensor | None]:
            g = node.take()
            tape.touch(copy + c * rank * self.tokens)
            g_inner = Tensor(tape, c * rank * self.tokens)
            longer = Tensor(tape, FLOAT32 * rank * vocabulary if alone else 0)
            tape.rename(longer, GRADIENTS)
            tape.touch(wide if low else 0)
            tape.touch(copy)
            shorter = Tensor(tape, FLOAT32 * rank * hidden)
            del g, g_inner
            return [longer, shorter]

        out.node = tape.record((), back, inner)
        return out

    # Parts of a layer --------------------------------------------------------------------------------------------

    def linear(self, x: Tensor, plan: LinearPlan) -> Tensor:
        """`x Wᵀ` plus the update: one node (engine.model.linear)."""
        return self.linears(x, [plan], None)[0]

    def linears(self, x: Tensor, plans: Sequence[LinearPlan], shared: LinearTerms | None) -> list[Tensor]:
        """The products of linears that read the same input, and their updates: one node.

        Args:
            x: the input.
            plans: of the linears.
            shared: of one update that does the work of all; None where each linear has its own.
        """
        tape, ys, kept = self.tape, [], []
        if any(plan.update is not None and plan.update.rescales_input for plan in plans):
            return [self._rescaled_linear(x, plan) for plan in plans]
        for plan in plans:
            if not (tape.recomputing and plan.ends_layer) or _rescales_output(plan):
                tape.touch(_forming_bytes(plan))
            ys.append(Tensor(tape, plan.out_bytes))
        updates = [plan.update for plan in plans if plan.update is not None] if shared is None else [shared]
        scratches = [plan.scratch_bytes for plan in plans if plan.update is not None] if shared is None else [0]
        for update, scratch in zip(updates, scratches, strict=True):
            if not tape.recomputing:
                tape.touch(max(update.first_bytes, _beside(scratch, update.first_forming_bytes)))
            kept.append(Tensor(tape, update.kept_bytes))
            tape.touch(max(update.forward_bytes, _beside(scratch, update.forming_forward_bytes)))
        if tape.nodes is None or (x.node is None and not updates):
            return ys
        waiting: list[Tensor] = []

        def back(node: Node) -> list[Tensor | None]:
            waiting.append(node.take())
            grad_x = None
            # What multiplies a result lets another gradient through to the frozen product.
            changed = [Tensor(tape, plan.out_bytes) for plan in plans if _rescales_output(plan)]
            if node.inputs[0] is not None:
                tape.touch(_forming_bytes(plans[0]))
                grad_x = Tensor(tape, plans[0].in_bytes)
                tape.touch(max((_forming_bytes(plan) for plan in plans[1:]), default=0))
            trained: list[Tensor | None] = []
            for update, scratch in zip(updates, scratches, strict=True):
                tape.touch(max(update.backward_bytes, _beside(scratch, update.forming_backward_bytes)))
                trained.append(Tensor(tape, FLOAT32 * update.parameters))
            waiting.clear()
            del changed
            return [grad_x, *trained]

        saved = [x] if any(update.keeps_input for update in updates) else []
        node = tape.record((x.node,), back, *saved, *kept) if updates else tape.record_plain((x.node,), back)
        if len(ys) == 1:
            ys[0].node = node
            return ys

        def wait(slot: Node) -> list[Tensor | None]:
            waiting.append(slot.take())
            return [None]

        # Gradients of all results come together; the one that arrives last lets the node run.
        ys[0].node = tape.record_plain((node,), lambda slot: [slot.take()])
        for y in ys[1:]:
            y.node = tape.record_plain((node,), wait)
        return ys

    def _rescaled_linear(self, x: Tensor, plan: LinearPlan) -> Tensor:
        """A linear by itself; its input is multiplied first, where the update does that."""
        if plan.update is None or not plan.update.rescales_input:
            return self.linear(x, plan)
        tape, terms = self.tape, plan.update
        out = Tensor(tape, plan.in_bytes)
        if tape.nodes is not None:

            def back(node: Node) -> list[Tensor | None]:
                g = node.take()
                tape.touch(terms.backward_bytes)
                trained = Tensor(tape, FLOAT32 * terms.parameters)
                grad = Tensor(tape, plan.in_bytes) if node.inputs[0] is not None else None
                del g
                return [grad, trained]

            out.node = tape.record((x.node,), back, x)
        return self.linear(out, msgspec.structs.replace(plan, update=None))

    def branch(self, x: Tensor, y: Tensor, terms: BranchTerms | None) -> Tensor:
        """What a method makes of a branch's result: one node (engine.methods.bottleneck).

        Args:
            x: the branch's input.
            y: its result.
            terms: None where nothing is put behind the branch.
        """
        if terms is None:
            return y
        tape = self.tape
        read, size = (x, x.size) if terms.reads == "input" else (y, y.size)
        kept, out = Tensor(tape, terms.kept_bytes), Tensor(tape, y.size)
        tape.touch(terms.forward_bytes)
        if tape.nodes is None:
            return out
        beside = terms.reads == "input"

        def back(node: Node) -> list[Tensor | None]:
            g = node.take()
            tape.touch(terms.backward_bytes)
            trained = Tensor(tape, FLOAT32 * terms.parameters)
            grad = Tensor(tape, size) if node.inputs[0] is not None else None
            tape.touch(terms.gradient_bytes)
            return [grad, *((g,) if beside else ()), trained]

        out.node = tape.record((read.node, y.node) if beside else (read.node,), back, read, kept)
        return out

    def norm(self, x: Tensor, size: int, *, rows: int = 1, gain_bytes: int = 0, trained: int = 0) -> Tensor:
        """Root mean square norm, float32 inside: one node (engine.model.fused).

        Args:
            x: in the compute dtype.
            size: bytes of it.
            rows: vectors of a token that are normalised each by itself; heads, or 1.
            gain_bytes: of a float32 gain that is formed each time (Gemma, OLMo 2); 0 where there is none.
            trained: entries of a gain that is trained; 0 where it is frozen.
        """
        tape, copies = self.tape, 0 if self.compute_bytes == FLOAT32 else 1
        piece = self._piece_bytes(size)
        if trained and not gain_bytes and self.compute_bytes != FLOAT32:
            # The trained gain in the compute dtype.
            gain_bytes = self.compute_bytes * trained
        gain = Tensor(tape, gain_bytes)
        out, root = Tensor(tape, size), Tensor(tape, FLOAT32 * self.tokens * rows)
        # A piece in float32, where it is not so already, and its squares or what was normalised.
        tape.touch((copies + 1) * piece)
        del gain
        if x.node is not None or (trained and tape.nodes is not None):

            def back(node: Node) -> list[Tensor | None]:
                g = node.take()
                gain = Tensor(tape, gain_bytes)
                grad = Tensor(tape, size) if node.inputs[0] is not None else None
                own = [Tensor(tape, FLOAT32 * trained)] if trained else []
                tape.touch(3 * piece)
                del g, gain
                return [grad, *own]

            out.node = tape.record((x.node,), back, x, root)
        return out

    def _piece_bytes(self, size: int) -> int:
        """Float32 bytes of what is worked on at one time, of a tensor of so many bytes in the compute dtype."""
        entries = size // self.compute_bytes
        if not self.converts:
            return FLOAT32 * entries
        tokens = max(1, ELEMENTWISE_CHUNK * self.tokens // max(1, entries))
        return FLOAT32 * (entries // self.tokens) * min(tokens, self.tokens)

    def cast(self, x: Tensor, before: int, after: int) -> Tensor:
        """From one dtype to another, by their bytes; nothing where they are the same."""
        return x if before == after else self.through(x, before, after)


def _rescales_output(plan: LinearPlan) -> bool:
    return plan.update is not None and plan.update.rescales_output


def _forming_bytes(plan: LinearPlan) -> int:
    """What forming the matrix of a linear needs beside the buffer that all linears share."""
    return plan.scratch_bytes if plan.update is None else max(plan.scratch_bytes, plan.update.adding_bytes)


def _beside(scratch: int, held: int | None) -> int:
    """What forming a dense matrix needs, beside what is held; nothing where it is not formed."""
    return 0 if held is None else held + scratch
