"""A step's births and deaths, recorded on a model of few layers and played as one of many, of any row length.

A recording is cut into blocks: what comes before the layers, each layer forward, the middle (norm, head, loss), each
layer backward, the tail. Decoder layers are alike, so the last recorded layer but one stands for all that are left out;
whether they are alike is checked on those that were recorded.
"""

import itertools

from edgepeft.engine.simulate.allocator import CachingAllocator


class Block:
    """What happened between two marks: births have numbers within it, deaths name a block and a number there."""

    def __init__(self, name):
        self.name = name
        self.sizes = []
        self.events = []

    def put_in_order(self):
        """Sorts what died together: some of torch's caches drop what they hold in the order of its addresses."""
        ordered = []
        for is_birth, run in itertools.groupby(self.events, lambda event: event == "+"):
            together = list(run)
            ordered += together if is_birth else sorted(together)
        self.events = ordered


class Recorder:
    """The trace of a `LiveBytes`; before the first `enter` and after `stop` it hears nothing."""

    def __init__(self):
        self.blocks = []
        self._born_at = {}
        self._open = None

    def enter(self, name):
        """Begins a block."""
        self._open = Block(name)
        self.blocks.append(self._open)

    def stop(self):
        """Hears nothing from now on."""
        self._open = None
        for block in self.blocks:
            block.put_in_order()

    def born(self, key, size_bytes):
        if self._open is not None:
            self._born_at[key] = (self._open.name, len(self._open.sizes))
            self._open.sizes.append(size_bytes)
            self._open.events.append("+")

    def died(self, key):
        place = self._born_at.pop(key, None)
        if place is not None and self._open is not None:
            self._open.events.append(place)


class Recording:
    """Blocks of a step of three layers or more, whose sizes may depend on the row length.

    Args:
        blocks: as recorded at `length`.
        length: tokens of a row.
        other: the same step at another length, and that length; None when only `length` is played.
    """

    def __init__(self, blocks, length, other=None):
        self._blocks = blocks
        self._length = length
        self._slopes = {}
        if other is not None:
            longer, other_length = other
            for block, its_twin in zip(blocks, longer, strict=True):
                if block.name != its_twin.name or block.events != its_twin.events:
                    raise RuntimeError(f"{block.name} does other things at {other_length} tokens than at {length}")
                self._slopes[block.name] = [
                    (size - own) / (other_length - length)
                    for own, size in zip(block.sizes, its_twin.sizes, strict=True)
                ]
        layers = {block.name: block for block in blocks if len(block.name) == 2}
        self._recorded = len(layers) // 2
        # The first layer may need no gradient of its input.
        for way, first in (("forward", 0), ("backward", 1)):
            if len({tuple(layers[way, at].sizes) for at in range(first, self._recorded)}) != 1:
                raise RuntimeError(f"layers are not alike on their way {way}")
        self._die_outside = {
            block.name: {event for event in block.events if event != "+" and len(event[0]) == 2}
            for block in blocks
            if len(block.name) == 1
        }

    def play(self, layers, length, trace, *, at_loss=lambda: None):
        """Tells `trace` of the births and deaths of a step of `layers` layers.

        Args:
            layers: of the whole model.
            length: tokens of a row.
            trace: `born(key, size)` and `died(key)`.
            at_loss: is called when the logits are there.

        Returns: the keys that are still alive: gradients, and what the recipe holds on to.
        """
        alive = set()

        def born(key, size):
            alive.add(key)
            trace.born(key, size)

        def died(key):
            # A death seen in a block that stands for many layers happens once.
            if key in alive:
                alive.remove(key)
                trace.died(key)

        for block, layer in self._order(layers):
            if block.name == ("loss",):
                at_loss()
            slopes = self._slopes.get(block.name)
            number = 0
            for event in block.events:
                if event == "+":
                    size = block.sizes[number]
                    if slopes is not None:
                        size += round(slopes[number] * (length - self._length))
                    born((block.name[0], layer, number), size)
                    number += 1
                else:
                    for key in self._targets(event, block.name, layer, layers):
                        died(key)
        return alive

    def _order(self, layers):
        for block in self._blocks:
            if len(block.name) == 1:
                yield block, None
                continue
            spread = list(self._standing_for(block.name[1], layers))
            for layer in spread if block.name[0] == "forward" else reversed(spread):
                yield block, layer

    def _standing_for(self, recorded, layers):
        """The layers of the whole model that a recorded one stands for."""
        pivot = self._recorded - 2
        if recorded < pivot:
            return range(recorded, recorded + 1)
        if recorded == pivot:
            return range(pivot, layers - 1)
        return range(layers - 1, layers)

    def _targets(self, place, block_name, layer, layers):
        """The keys of what dies, given where it was born and which layer's block the death is in."""
        (way, *at), number = place
        if not at:
            return [(way, None, number)]
        if layer is not None:
            return [(way, layer + at[0] - block_name[1], number)]
        # Outside of the layers either all of them lose something, or the first, or only some at the end.
        if ((way, 1), number) in self._die_outside[block_name]:
            return [(way, each, number) for each in self._standing_for(at[0], layers)]
        return [(way, at[0] + layers - self._recorded if at[0] else 0, number)]


class Peaks:
    """What a run takes of torch's allocator: tensors that stay, and steps."""

    def __init__(self):
        self.allocator = CachingAllocator(expandable_segments=False)
        self._count = 0
        self._held = []
        self._step = 0

    def keep(self, sizes):
        """Allocates what stays; returns its keys."""
        keys = []
        for size in sizes:
            self._count += 1
            self.allocator.born(self._count, size)
            keys.append(self._count)
        return keys

    def drop(self, keys):
        """Frees what `keep` allocated."""
        for key in keys:
            self.allocator.died(key)

    def step(self, recording, layers, length, *, after=()):
        """One micro-batch, then `after`: sizes that live together for a moment while gradients are still there.

        What the recipe holds of its forward stays until the logits of the next step are there.
        """
        self._step += 1
        left = recording.play(layers, length, _Numbered(self.allocator, self._step), at_loss=self._let_go)
        self.drop(self.keep(after))
        for key in left:
            if key[0] in ("middle", "loss"):
                self._held.append((self._step, key))
            else:
                self.allocator.died((self._step, key))

    def _let_go(self):
        for key in self._held:
            self.allocator.died(key)
        self._held = []


class _Numbered:
    """Keys of one step among those of many."""

    def __init__(self, trace, step):
        self._trace, self._step = trace, step

    def born(self, key, size):
        self._trace.born((self._step, key), size)

    def died(self, key):
        self._trace.died((self._step, key))
