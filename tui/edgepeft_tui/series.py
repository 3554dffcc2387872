"""Points for a chart: any number of them in bounded memory, and as many as a width can show."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import msgspec

_LIMIT = 1024


class Curve(msgspec.Struct, frozen=True):
    """Points from left to right."""

    xs: tuple[float, ...] = ()
    ys: tuple[float, ...] = ()


class Thinned:
    """Collects points; whenever there are too many, neighbours become their mean two by two.

    So ten thousand steps cost no more to keep and to draw than a thousand. Values that are not finite have no place on
    a chart and are left out.
    """

    def __init__(self, points: Iterable[tuple[float, float | None]] = (), limit: int = _LIMIT) -> None:
        self._limit = limit
        self._each = 1
        self._xs: list[float] = []
        self._ys: list[float] = []
        self._open = 0
        """Points in the last mean, of the `_each` that it takes."""
        for x, y in points:
            self.add(x, y)

    def add(self, x: float, y: float | None) -> None:
        """Takes one more point, to the right of those before."""
        if y is None or not math.isfinite(y):
            return
        if 0 < self._open < self._each:
            self._open += 1
            self._xs[-1] += (x - self._xs[-1]) / self._open
            self._ys[-1] += (y - self._ys[-1]) / self._open
            return
        if len(self._xs) == self._limit:
            self._xs = _paired(self._xs)
            self._ys = _paired(self._ys)
            self._each *= 2
        self._xs.append(x)
        self._ys.append(y)
        self._open = 1

    def curve(self) -> Curve:
        """The points as they are now."""
        return Curve(tuple(self._xs), tuple(self._ys))


def _paired(values: list[float]) -> list[float]:
    return [(first + second) / 2 for first, second in zip(values[::2], values[1::2], strict=True)]


def fitted(curve: Curve, places: int) -> Curve:
    """The curve in at most `places` points, each the mean of its neighbours; the first and the last stay themselves."""
    count = len(curve.xs)
    if count <= places or places < 3:
        return curve
    inner = places - 2
    edges = [1 + round(index * (count - 2) / inner) for index in range(inner + 1)]
    spans = [slice(start, end) for start, end in itertools.pairwise(edges) if end > start]

    def means(values: tuple[float, ...]) -> tuple[float, ...]:
        return (values[0], *(sum(values[span]) / len(values[span]) for span in spans), values[-1])

    return Curve(means(curve.xs), means(curve.ys))


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers within `low` to `high`, at most `most` of them, for the axis of a chart."""
    if not high > low or most < 2:
        return [low]
    raw = (high - low) / (most - 1)
    unit = 10.0 ** math.floor(math.log10(raw))
    distance = next(unit * factor for factor in (1, 2, 2.5, 5, 10, 20) if unit * factor >= raw * 0.999)
    first = math.ceil(low / distance - 1e-9)
    last = math.floor(high / distance + 1e-9)
    return [index * distance for index in range(first, last + 1)]
