"""One micro-batch on a tape: forward, loss and backward of a model with few layers, and from them one with many.

Layers of one kind are alike, so a model of one layer of each kind and a first one shows all there is: whatever the
others keep, and the gradients that they leave, is added by multiplication.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import msgspec

from edgepeft.memory.chunks import loss_rows
from edgepeft.memory.operations import FLOAT32, Operations
from edgepeft.memory.programs import LayerPlan, Program
from edgepeft.memory.tape import GRADIENTS, LOSS, RECOMPUTED, Node, Peak, Tape, Tensor
from edgepeft.methods import Trained

_INT64 = 8


class LossPlan(msgspec.Struct, frozen=True):
    """The cross-entropy over the vocabulary, a chunk of rows at a time (engine.training.loss)."""

    trained: int
    """Tokens whose successor carries loss."""
    chunk_rows: int
    """Rows of one chunk."""
    row_bytes: int
    """Of one row of hidden states."""
    vocab: int
    compute_bytes: int
    scratch_bytes: int
    """Float32 scratch at the most, where one row needs less."""
    softcap: bool
    trains_head: bool = False
    """Whether the head's matrix gets a gradient, which is formed with the loss."""
    adding_bytes: int = 0
    """What adding up a chunk's part of that takes, beside it."""
    rank: int = 0
    """Of a trained product beside the head's matrix (engine.training.added_head); 0 where there is none."""
    adding_rank_bytes: tuple[int, int] = (0, 0)
    """What adding up a chunk's part of the gradients of its two factors takes, beside them."""
    masked_tokens: int = 0
    """Of the micro-batch, where entries of what that product is given are dropped; else 0."""

    @property
    def head_bytes(self) -> int:
        """Of the head's matrix in the compute dtype."""
        return self.vocab * self.row_bytes


class MicroBatchPlan(msgspec.Struct, frozen=True):
    """What goes through a model at once."""

    tokens: int
    compute_bytes: int
    program: Program
    kinds: tuple[LayerPlan, ...]
    """The kinds of decoder layers."""
    kind_of_layer: tuple[int, ...]
    """For each layer its kind, from the first layer on."""
    gain_bytes: int
    """See `LayerPlan`."""
    scales_embeddings: bool
    """Whether the embeddings are multiplied by a number, which makes them anew."""
    angle_bytes: int
    """Of the sines and cosines of all positions."""
    converts: bool
    """See `Operations`."""
    loss: LossPlan
    trained: Trained
    """What the method trains."""
    others_beside_tape: int
    """Entries of what it trains of no layer, but for final norm, embedding and head, whose gradients the tape forms."""
    trains_tables: bool = False
    """Whether the embedding and the output head are among it."""
    tied: bool = False
    """Whether these are one."""
    embedding_rank: int = 0
    """Of a trained product beside the embedding; 0 where there is none."""
    leading_rows: int = 0
    """Trained rows before each sample."""
    samples: int = 0
    """Of the row."""


class Place(msgspec.Struct, frozen=True):
    """The highest point of one place in the whole model."""

    name: str
    by_category: tuple[int, ...]
    """In the order of `tape.CATEGORIES`."""

    @property
    def total_bytes(self) -> int:
        """Of all categories."""
        return sum(self.by_category)


def train(plan: MicroBatchPlan, *, checkpointed: bool, alone: bool, offloaded: bool = False) -> Place:
    """The highest point of forward and backward.

    Args:
        plan: the micro-batch.
        checkpointed: whether layers keep only their input.
        alone: whether gradients come into being in this backward instead of being there already.
        offloaded: whether those inputs lie on the host.
    """
    tape = Tape("forward")
    tape.nodes = []
    prefix = plan.kinds[0].prefix
    adds_up = prefix is not None and prefix.terms.shared > 0
    layers = _Layers(plan.kind_of_layer, FLOAT32 * sum(plan.trained.of_layer) if alone else 0, adds_up=adds_up)
    hidden = _forward(plan, tape, layers, checkpointed=checkpointed, offloaded=offloaded, alone=alone)
    tape.enter("loss")
    tape.category = LOSS
    end = hidden.node
    gradient, of_head = _loss(plan.loss, tape, lets_through=end is not None)
    del hidden
    tape.enter("backward of the loss")
    tape.category = RECOMPUTED
    if end is not None:
        end.gradient = Tensor(tape, plan.tokens * plan.loss.row_bytes)
        tape.touch(plan.loss.trained * plan.loss.row_bytes)
    del gradient, end
    held: list[Tensor] = []
    if alone and not adds_up and not plan.leading_rows:
        # Of no layer: when exactly they come into being matters little.
        tape.category = GRADIENTS
        held.append(Tensor(tape, FLOAT32 * plan.others_beside_tape))
        tape.category = RECOMPUTED

    def accumulate(gradient: Tensor) -> None:
        if alone:
            tape.rename(gradient, GRADIENTS)
            held.append(gradient)

    while of_head:
        accumulate(of_head.pop(0))
    tape.backward(accumulate)
    tape.leave()
    return max((place for peak in tape.peaks for place in layers.places(peak)), key=lambda place: place.total_bytes)


def evaluate(plan: MicroBatchPlan) -> Place:
    """The highest point of a forward without gradients."""
    tape = Tape("forward")
    layers = _Layers(plan.kind_of_layer, 0)
    hidden = _forward(plan, tape, layers, checkpointed=False)
    tape.enter("loss")
    tape.category = LOSS
    _loss(plan.loss, tape, lets_through=False)
    del hidden
    tape.leave()
    peak = max(tape.peaks, key=lambda peak: peak.total)
    return Place(peak.place, peak.by_category)


class _Layers:
    """Which layers are run, and what the others add.

    The first layer is run, and of each kind the last one: nothing lies higher in a layer between those of its kind,
    since from layer to layer what is kept falls evenly and gradients grow evenly. Where gradients are added up from the
    last layer on, the one before it is run as well.
    """

    def __init__(self, kind_of_layer: Sequence[int], gradient_bytes: int, *, adds_up: bool = False) -> None:
        self.kind_of_layer = kind_of_layer
        last = {kind: number for number, kind in enumerate(kind_of_layer)}
        self.run = sorted({0, *last.values(), *({max(0, len(kind_of_layer) - 2)} if adds_up else ())})
        """Numbers of the layers that are run, from 0."""
        self.kept: dict[int, list[int]] = {}
        """What a layer of each kind keeps for backward, by category; the first layer is not asked."""
        self._gradient_bytes = gradient_bytes

    def places(self, peak: Peak) -> list[Place]:
        """The places of the whole model that a place of the run ones stands for."""
        direction, separator, number = peak.place.partition(" of layer ")
        if not separator:
            return [Place(peak.place, self._moved(peak, len(self.kind_of_layer), len(self.kind_of_layer)))]
        run = int(number) - 1
        numbers = {run}
        if direction == "backward" and self._gradient_bytes and run:
            kind = self.kind_of_layer[run]
            numbers.add(self.kind_of_layer.index(kind, 1))
        return [Place(f"{direction} of layer {n + 1}", self._moved(peak, run, n, direction)) for n in numbers]

    def _moved(self, peak: Peak, run: int, number: int, direction: str = "") -> tuple[int, ...]:
        """The bytes of a place in layer `run` of the run ones, in layer `number` of all."""
        found = list(peak.by_category)
        counts: dict[int, int] = {}
        for kind in self.kind_of_layer[1:number]:
            counts[kind] = counts.get(kind, 0) + 1
        for other in self.run[1:]:
            if other < run:
                kind = self.kind_of_layer[other]
                counts[kind] = counts.get(kind, 0) - 1
        for kind, count in counts.items():
            if count:
                for category, size in enumerate(self.kept[kind]):
                    found[category] += count * size
        if direction == "backward":
            above = len(self.kind_of_layer) - 1 - number - sum(other > run for other in self.run)
            found[GRADIENTS] += above * self._gradient_bytes
        return tuple(found)


def _forward(
    plan: MicroBatchPlan,
    tape: Tape,
    layers: _Layers,
    *,
    checkpointed: bool,
    offloaded: bool = False,
    alone: bool = False,
) -> Tensor:
    """The hidden states after the final norm."""
    ops = Operations(tape, plan.tokens, plan.compute_bytes, plan.angle_bytes, converts=plan.converts)
    size = plan.tokens * plan.loss.row_bytes
    # The caller of the layers holds the embeddings to the end.
    if plan.trains_tables:
        # A tied table has the head's gradient by then.
        entries = plan.loss.head_bytes // plan.compute_bytes
        embeddings = ops.look_up(size, FLOAT32 * entries if alone and not plan.tied else 0)
    else:
        embeddings = Tensor(tape, size)
    if plan.embedding_rank:
        width = plan.loss.row_bytes // plan.compute_bytes
        embeddings = ops.add_rows(embeddings, plan.embedding_rank, plan.loss.vocab, width, alone=alone)
    given = None
    if plan.leading_rows:
        _put_rows_before(plan, ops, embeddings)
        # The training step hands them in, and holds them as well.
        given = embeddings
    if plan.scales_embeddings:
        embeddings = ops.through(embeddings, size, size, keeps=True)
    hidden = embeddings
    for number in layers.run:
        kind = plan.kind_of_layer[number]
        tape.enter(f"forward of layer {number + 1}")
        before = tape.live[:]
        layer = partial(plan.program, ops, plan.kinds[kind])
        hidden = tape.checkpointed(layer, hidden, offload=offloaded) if checkpointed else layer(hidden)
        if hidden.node is not None:
            hidden.node.place = f"backward of layer {number + 1}"
        if number:
            # An offloaded input leaves with its layer, whatever the number of layers.
            layers.kept[kind] = [0 if offloaded else now - then for now, then in zip(tape.live, before, strict=True)]
    hidden = plan.kinds[0].hidden_norm(ops, hidden)
    del given
    return hidden


def _put_rows_before(plan: MicroBatchPlan, ops: Operations, embeddings: Tensor) -> None:
    """Trained rows before each sample (engine.model.prompt)."""
    tape, rows = ops.tape, plan.leading_rows
    trained = FLOAT32 * plan.trained.others[0]
    ops.places = Tensor(tape, _INT64 * plan.samples * rows)
    tape.touch(0 if plan.compute_bytes == FLOAT32 else rows * plan.loss.row_bytes)
    if tape.nodes is None:
        return

    def back(node: Node) -> list[Tensor | None]:
        g = node.take()
        parts = Tensor(tape, plan.samples * rows * plan.loss.row_bytes)
        own = Tensor(tape, trained)
        del g, parts
        return [own]

    embeddings.node = tape.record_plain((), back)


def _loss(plan: LossPlan, tape: Tape, *, lets_through: bool) -> tuple[Tensor | None, list[Tensor]]:
    """The gradients of the rows that meet the head, None where nothing below learns, and of what is trained of a head.

    Args:
        plan: of the loss.
        tape: with its nodes where there are gradients.
        lets_through: whether something below the head learns.
    """
    recording = tape.nodes is not None
    rows = loss_rows(plan.trained, plan.chunk_rows)
    chunk = min(plan.chunk_rows, rows)
    gradient = Tensor(tape, rows * plan.row_bytes) if recording and lets_through else None
    trained: list[Tensor] = []
    if not plan.trained:
        return gradient, trained
    copies = []
    wide = FLOAT32 * plan.head_bytes // plan.compute_bytes
    if plan.trains_head:
        trained += [Tensor(tape, wide)] if recording else []
        copies.append(Tensor(tape, 0 if plan.compute_bytes == FLOAT32 else plan.head_bytes))
    if plan.rank:
        # A and B, their copies in the compute dtype, and what is dropped.
        sizes = [plan.rank * plan.row_bytes, plan.rank * plan.compute_bytes * plan.vocab]
        trained += [Tensor(tape, FLOAT32 * size // plan.compute_bytes) for size in sizes if recording]
        copies += [Tensor(tape, size) for size in sizes if plan.compute_bytes != FLOAT32]
        copies.append(Tensor(tape, plan.masked_tokens * plan.row_bytes if recording else 0))
    buffer = Tensor(tape, chunk * plan.vocab * plan.compute_bytes)
    picked = Tensor(tape, chunk * plan.row_bytes)
    # The rows of the chunk before live until the next ones are there.
    tape.touch(min(chunk, rows - chunk) * plan.row_bytes)
    inner_bytes = chunk * plan.rank * plan.compute_bytes
    masked = chunk * plan.row_bytes if plan.masked_tokens and recording else 0
    mask = Tensor(tape, masked)
    tape.touch(masked + inner_bytes)
    inner = Tensor(tape, inner_bytes)
    step = max(1, min(chunk, plan.trained, plan.scratch_bytes // (FLOAT32 * plan.vocab)))
    tape.touch((2 if plan.softcap and recording else 1) * step * plan.vocab * FLOAT32)
    if recording:
        of_a, of_b = plan.adding_rank_bytes
        tape.touch(max(plan.adding_bytes, inner_bytes + max(masked + of_a, of_b) if plan.rank else 0))
    del buffer, picked, copies, inner, mask
    return gradient, trained
