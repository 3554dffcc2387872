"""A tape of tensors that have a size and a life and no values: what lives when, in a model's forward and backward.

A `Tensor` counts from its making until its last reference goes, as torch's storages do under CPython, so a program that
keeps and drops references where the model's code does holds the same bytes at the same moments. Recording follows
torch's autograd: a node keeps what its backward needs and gives it up after it has run; gradients that meet are added
into a new tensor; nodes run in the opposite order of their making. It takes microseconds an operation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from edgepeft.memory.breakdown import Category

CATEGORIES: tuple[Category, ...] = ("saved activations", "logits and loss", "recomputed layer", "gradients")
"""What a micro-batch brings into being; a tensor belongs to the one that was in force at its birth."""
SAVED, LOSS, RECOMPUTED, GRADIENTS = range(4)
_NOTHING = (0,) * len(CATEGORIES)


class Peak:
    """The highest point of one place."""

    __slots__ = ("by_category", "place", "total")

    def __init__(self, place: str, total: int, by_category: tuple[int, ...]) -> None:
        self.place = place
        self.total = total
        self.by_category = by_category
        """Bytes in the order of `CATEGORIES`."""


class Tape:
    """What lives, what has been recorded, and the highest points so far."""

    __slots__ = (
        "_offloaded",
        "_peak",
        "_peak_live",
        "_place",
        "_saves",
        "_stop",
        "category",
        "keeps",
        "live",
        "nodes",
        "peaks",
        "recomputing",
    )

    def __init__(self, place: str = "") -> None:
        self.live = [0] * len(CATEGORIES)
        """Bytes by category."""
        self.category = SAVED
        """Of tensors born from now on."""
        self.nodes: list[Node] | None = None
        """Of the graph that is being recorded; None where nothing is."""
        self.keeps = True
        """Whether nodes keep what they save; under checkpointing they do not."""
        self.peaks: list[Peak] = []
        """Of places that were left, oldest first."""
        self.recomputing = False
        """Whether a checkpointed layer runs again."""
        self._place = place
        self._peak = 0
        self._peak_live = _NOTHING
        self._saves = 0
        self._stop = -1
        self._offloaded: Segment | None = None

    def enter(self, place: str) -> None:
        """The work goes on at another place."""
        self.leave()
        self._place = place

    def leave(self) -> None:
        """Ends a place: its highest point joins `peaks`."""
        self.peaks.append(Peak(self._place, self._peak, self._peak_live))
        self._peak = 0
        self.touch(0)

    def touch(self, size: int) -> None:
        """Something of `size` bytes comes and goes."""
        total = sum(self.live) + size
        if total > self._peak:
            self._peak = total
            live = self.live[:]
            live[self.category] += size
            self._peak_live = tuple(live)

    def record(self, inputs: tuple[Node | None, ...], back: Backward, *saved: Tensor) -> Node:
        """A node that keeps something for its backward, be it only a weight.

        torch keeps inputs before an operation runs and outputs after it; so must the caller.

        Raises:
            Recomputed: this was the last that a recomputation is for.
        """
        assert self.nodes is not None
        node = Node(inputs, back, saved if self.keeps else None)
        self.nodes.append(node)
        self._saves += 1
        if self._saves == self._stop:
            raise Recomputed
        return node

    def record_plain(self, inputs: tuple[Node | None, ...], back: Backward) -> Node:
        """A node that keeps nothing."""
        assert self.nodes is not None
        node = Node(inputs, back, ())
        self.nodes.append(node)
        return node

    def checkpointed(self, layer: Callable[[Tensor], Tensor], x: Tensor, *, offload: bool = False) -> Tensor:
        """Runs a layer so that its nodes keep nothing but its input (torch.utils.checkpoint, not reentrant).

        With `offload` the input is given up when the layer is done (engine.training.offload).
        """
        nodes = self.nodes
        if nodes is None:
            return layer(x)
        begin, before = len(nodes), self._saves
        self.keeps = False
        out = layer(x)
        self.keeps = True
        segment = Segment(layer, x, nodes[begin:], self._saves - before)
        for node in segment.nodes:
            if node.saved is None:
                node.segment = segment
        if offload:
            segment.below, segment.size, segment.made_by = self._offloaded, x.size, x.node
            segment.x, self._offloaded = None, segment
        return out

    def recompute(self, segment: Segment) -> None:
        """Runs a checkpointed layer again, up to the last thing that a node of it keeps."""
        x = segment.fetch(self)
        if segment.size:
            segment.x = None
            if segment.below is not None:
                segment.below.fetch(self)
        outer, self.nodes = self.nodes, []
        self._saves, self._stop = 0, segment.saves
        self.recomputing = True
        with contextlib.suppress(Recomputed):
            segment.layer(x)
        self.recomputing = False
        self._stop = -1
        for node, again in zip(segment.nodes, self.nodes, strict=False):
            node.saved, again.saved = again.saved, ()
        self.nodes, segment.nodes = outer, []

    def rename(self, tensor: Tensor, category: int) -> None:
        """A tensor belongs to another category from now on."""
        self.live[tensor.category] -= tensor.size
        self.live[category] += tensor.size
        tensor.category = category

    def backward(self, accumulate: Callable[[Tensor], None]) -> None:
        """Runs every node, last first, from those that have a gradient already.

        Args:
            accumulate: takes the gradients of one linear's trained tensors, together.
        """
        nodes = self.nodes
        assert nodes is not None
        while nodes:
            node = nodes.pop()
            if node.gradient is None:
                node.saved = ()
                continue
            if node.place:
                self.enter(node.place)
            if node.saved is None:
                assert node.segment is not None
                self.recompute(node.segment)
            gradients = node.back(node)
            node.saved = ()
            node.segment = None
            for target in node.inputs:
                gradient_of_input = gradients.pop(0)
                if target is not None and gradient_of_input is not None:
                    self._meet(target, gradient_of_input)
                gradient_of_input = None
            while gradients:
                trained = gradients.pop(0)
                if trained is not None:
                    accumulate(trained)
                trained = None

    def _meet(self, target: Node, gradient: Tensor) -> None:
        held = target.gradient
        target.gradient = gradient if held is None else Tensor(self, gradient.size)


class Tensor:
    """A storage; a view of it is the same object, or one of size 0 with the storage as `base`."""

    __slots__ = ("_tape", "base", "category", "node", "size")

    def __init__(self, tape: Tape, size: int, node: Node | None = None) -> None:
        self.size = size
        """Bytes."""
        self.node = node
        """That made it; None where no gradient goes through it."""
        self.base: Tensor | None = None
        self._tape = tape
        category = self.category = tape.category
        live = tape.live
        live[category] += size
        total = sum(live)
        if total > tape._peak:
            tape._peak = total
            tape._peak_live = tuple(live)

    def __del__(self) -> None:
        self._tape.live[self.category] -= self.size


Backward = Callable[["Node"], list["Tensor | None"]]
"""From a node with a gradient to the gradients of its inputs, in order, and of trained tensors behind them."""


class Node:
    """One recorded operation."""

    __slots__ = ("back", "gradient", "inputs", "place", "saved", "segment")

    def __init__(self, inputs: tuple[Node | None, ...], back: Backward, saved: tuple[Tensor, ...] | None) -> None:
        self.inputs = inputs
        """The nodes that made its inputs; None where no gradient is wanted."""
        self.back = back
        self.saved = saved
        """None where a checkpointed layer has to run again first."""
        self.gradient: Tensor | None = None
        """Of its output."""
        self.segment: Segment | None = None
        self.place = ""
        """Where the work has got to when this node runs backward; empty leaves it."""

    def take(self) -> Tensor:
        """The gradient of its output, given up by the node."""
        gradient, self.gradient = self.gradient, None
        assert gradient is not None
        return gradient


class Segment:
    """A checkpointed layer."""

    __slots__ = ("below", "layer", "made_by", "nodes", "saves", "size", "x")

    def __init__(self, layer: Callable[[Tensor], Tensor], x: Tensor, nodes: list[Node], saves: int) -> None:
        self.layer = layer
        self.x: Tensor | None = x
        """Its input; None where that lies on the host."""
        self.size = 0
        """Bytes of an offloaded input."""
        self.made_by: Node | None = None
        """Its node."""
        self.below: Segment | None = None
        """The layer whose input is brought back while this one is computed."""
        self.nodes = nodes
        self.saves = saves

    def fetch(self, tape: Tape) -> Tensor:
        """Its input, brought back where it is not there."""
        if self.x is None:
            category, tape.category = tape.category, SAVED
            self.x = Tensor(tape, self.size, self.made_by)
            tape.category = category
        return self.x


class Recomputed(Exception):
    """All that was needed has been formed again."""
