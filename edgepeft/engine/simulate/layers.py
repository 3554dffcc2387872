"""From a model of few layers to one of many: each place's bytes grow evenly with the layers, their maximum does not."""

from __future__ import annotations

import re
from collections.abc import Iterator

from edgepeft.engine.simulate.step import Peaks
from edgepeft.memory.breakdown import Category

_LAYER = re.compile(r"(.* layer )(\d+)$")


def few_layers(layers: int, period: int) -> tuple[int, int] | None:
    """Two small layer counts from which `extrapolated` gets `layers`; None where all layers are no more work.

    Both have a layer of each kind that is neither first nor last, and end with the same kinds as the whole model.
    """
    smaller = period + 2 + (layers - 2) % period
    larger = smaller + period
    return (smaller, larger) if smaller + larger < layers else None


def extrapolated(one: Peaks, other: Peaks, counts: tuple[int, int], layers: int, period: int) -> Peaks:
    """The peaks of places in a model with `layers` layers, from those with `counts` layers.

    A place in a layer is found by its distance from the first layer and by that from the last: between them, bytes
    grow or fall evenly from layer to layer, so that nothing lies above both ends.

    Args:
        one: with `counts[0]` layers.
        other: with `counts[1]`, `period` more.
        counts: see `few_layers`.
        layers: wanted.
        period: after how many layers their kinds repeat.
    """
    steps, rest = divmod(layers - counts[1], counts[1] - counts[0])
    assert rest == 0
    found: Peaks = {}
    for place, here, there in _pairs(one, other, counts, layers, period):
        names = here.keys() | there.keys()
        found[place] = {
            name: there.get(name, 0) + steps * (there.get(name, 0) - here.get(name, 0)) for name in sorted(names)
        }
    return found


def _pairs(
    one: Peaks, other: Peaks, counts: tuple[int, int], layers: int, period: int
) -> Iterator[tuple[str, dict[Category, int], dict[Category, int]]]:
    kinds = {match.group(1) for place in one if (match := _LAYER.match(place))}
    for place in one.keys() & other.keys():
        if not _LAYER.match(place):
            yield place, one[place], other[place]
    for kind in kinds:
        # (number in the whole model, in the first small one, in the second): from the bottom, then from the top.
        numbers = [(n, n, n) for n in range(1, period + 2)]
        numbers += [(layers - n, counts[0] - n, counts[1] - n) for n in range(period + 1)]
        for whole, small, large in numbers:
            here, there = one.get(f"{kind}{small}"), other.get(f"{kind}{large}")
            if here is not None and there is not None:
                yield f"{kind}{whole}", here, there
