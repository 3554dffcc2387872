"""What an allocator would hold for a model of many layers, from the traces of two models of few.

Bytes that live grow evenly with the layers; what an allocator reserves does not: segments and pages are large, and what
lies free between blocks depends on their order. So the whole model's trace is made from the small ones by repeating the
events of layers, and is then replayed through the allocator.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter, deque
from collections.abc import Callable, Hashable
from typing import NamedTuple, Protocol

from edgepeft.memory.breakdown import PhaseName

_LAYER = re.compile(r"(.* layer) (\d+)$")

Born = tuple[int, int]
"""Visit and number of a birth in it."""
Name = tuple[int, int, int]


class Allocator(Protocol):
    """What a trace is replayed through."""

    reserved_bytes: int
    peak_reserved_bytes: int

    def born(self, key: int, size_bytes: int) -> None:
        """A storage was allocated."""
        ...

    def died(self, key: int) -> None:
        """It was freed."""
        ...

    def empty_cache(self) -> None:
        """Gives what is free back to the driver."""
        ...


class _Visit:
    """What happened from one change of the place to the next."""

    def __init__(self, place: str) -> None:
        self.place = place
        match = _LAYER.match(place)
        self.kind = match.group(1) if match else place
        self.layer = int(match.group(2)) if match else None
        self.sizes: list[int] = []
        """Bytes of each storage born here."""
        self.events: list[int | Born | PhaseName] = []
        """The number of a birth, a death, or the end of a phase."""


class Recording:
    """A trace that remembers births and deaths with the place where they happened.

    Args:
        place: tells where the work has got to; `… layer 3` is in the third layer.
    """

    def __init__(self, place: Callable[[], str]) -> None:
        self._place = place
        self._alive: dict[int, Born] = {}
        self.visits: list[_Visit] = []
        self.deaths: dict[Born, int] = {}
        """The visit in which a storage died."""

    def born(self, key: int, size_bytes: int) -> None:
        """A storage was allocated; `key` is its own until it dies."""
        visit = self._here()
        self._alive[key] = (len(self.visits) - 1, len(visit.sizes))
        visit.events.append(len(visit.sizes))
        visit.sizes.append(size_bytes)

    def died(self, key: int) -> None:
        """The storage of that key was freed."""
        visit = self._here()
        born = self._alive.pop(key)
        self.deaths[born] = len(self.visits) - 1
        visit.events.append(born)

    def end(self, phase: PhaseName) -> None:
        """A phase is over."""
        self._here().events.append(phase)

    def _here(self) -> _Visit:
        place = self._place()
        if not self.visits or self.visits[-1].place != place:
            self.visits.append(_Visit(place))
        return self.visits[-1]


def replay(recording: Recording, allocator: Allocator) -> dict[PhaseName, int]:
    """The most that the allocator reserves in each phase; the step begins with what loading has cached."""
    storages = _Storages(allocator)
    for at, visit in enumerate(recording.visits):
        for event in visit.events:
            if isinstance(event, int):
                storages.make((at, event), visit.sizes[event])
            elif isinstance(event, str):
                storages.end(event)
            else:
                storages.free(event)
    return storages.reserved


def replay_repeated(
    one: Recording, other: Recording, layers: int, period: int, allocator: Allocator
) -> dict[PhaseName, int] | None:
    """The same for a model of `layers` layers.

    Args:
        one: of a model that has `period` layers less than `other`'s.
        other: of a model whose first, inner and last layers are those of the whole one.
        layers: of the whole model, some periods more than `other`'s.
        period: after how many layers their kinds repeat.
        allocator: fresh.

    Returns:
        None where the two traces differ in more than repeated layers.
    """
    fewer, parts = _parts(one), _parts(other)
    if fewer is None or parts is None or [part.kind for part in fewer] != [part.kind for part in parts]:
        return None
    whole = _Whole(other, parts, layers, period)
    for number, part in enumerate(fewer):
        if part.layers is None and not whole.repeat_outside(number, one, part.visits[0], fewer):
            return None
    return whole.replay(allocator)


class _Part(NamedTuple):
    """A visit outside of layers, or all layers in one order."""

    kind: str
    visits: list[int]
    layers: list[int] | None
    """The layers in the order in which they were visited; None outside of layers."""


def _parts(recording: Recording) -> list[_Part] | None:
    """The visits, those of layers that follow each other as one part; None where a part misses a layer."""
    parts: list[_Part] = []
    for at, visit in enumerate(recording.visits):
        before = parts[-1].layers if parts and parts[-1].kind == visit.kind else None
        if visit.layer is None:
            parts.append(_Part(visit.kind, [at], None))
        elif before is None or visit.layer in before:
            parts.append(_Part(visit.kind, [at], [visit.layer]))
        else:
            parts[-1].visits.append(at)
            before.append(visit.layer)
    inside = [part.layers for part in parts if part.layers is not None]
    upwards = list(range(1, max(map(max, inside), default=0) + 1))
    return parts if all(numbers in (upwards, upwards[::-1]) for numbers in inside) else None


class _Storages:
    """The living storages of a replay, those of one name first in, first out."""

    def __init__(self, allocator: Allocator) -> None:
        self._allocator = allocator
        self._alive: dict[Hashable, deque[int]] = {}
        self._born = 0
        self.reserved: dict[PhaseName, int] = {}

    def make(self, name: Hashable, size_bytes: int) -> None:
        self._alive.setdefault(name, deque()).append(self._born)
        self._allocator.born(self._born, size_bytes)
        self._born += 1

    def free(self, name: Hashable) -> None:
        """Frees one of that name, if one lives."""
        if alive := self._alive.get(name):
            self._allocator.died(alive.popleft())

    def end(self, phase: PhaseName) -> None:
        """Keeps what the phase needed; after the step, phases are told from their own needs, not from its cache."""
        self.reserved[phase] = self._allocator.peak_reserved_bytes
        if phase != "load":
            self._allocator.empty_cache()
            self._allocator.peak_reserved_bytes = self._allocator.reserved_bytes


class _Whole:
    """The trace of the whole model, told from that of a smaller one.

    A storage of a layer is named by part, layer and number; one from outside of layers by its part, its size and where
    it dies, since such storages are alike.
    """

    def __init__(self, recording: Recording, parts: list[_Part], layers: int, period: int) -> None:
        self._recording = recording
        self._parts = parts
        self._layers = layers
        self._period = period
        self._more = layers - max(len(part.layers or ()) for part in parts)
        self._place = _places(parts)
        self._copies: Counter[Born] = Counter()
        """Storages from outside of layers that occur more often in the whole model, and how often more."""
        self._growth: dict[Born, int] = {}
        """Bytes by which others are larger there."""
        self._translations: dict[tuple[int, int, int], dict[int, int]] = {}

    def repeat_outside(self, number: int, one: Recording, at: int, fewer: list[_Part]) -> bool:
        """Finds what a part outside of layers has once a layer, such as optimizer state; False if it is irregular.

        Args:
            number: of the part.
            one: the trace with fewer layers.
            at: its visit.
            fewer: its parts.
        """
        mine = self._parts[number].visits[0]
        places = _places(fewer)
        before = Counter(_name(one, places, (at, index)) for index in range(len(one.visits[at].sizes)))
        names = [_name(self._recording, self._place, (mine, index)) for index in range(len(self._sizes(mine)))]
        more, times = Counter(names), self._more // self._period
        more.subtract(before)
        for shorter in sorted(before):
            while more[shorter] < 0:
                # One that holds something of every layer is longer, and dies where the shorter one does.
                likes = (name for name in names if name > shorter and name[2] == shorter[2] and more[name] > 0)
                longer = min(likes, default=None)
                if longer is None:
                    return False
                more[shorter] += 1
                more[longer] -= 1
                self._growth[mine, names.index(longer)] = times * (longer[1] - shorter[1])
        for index in reversed(range(len(names))):
            if more[names[index]] > 0 and (mine, index) not in self._growth:
                more[names[index]] -= 1
                self._copies[mine, index] = times
        return True

    def replay(self, allocator: Allocator) -> dict[PhaseName, int]:
        storages = _Storages(allocator)
        for number, part in enumerate(self._parts):
            if part.layers is None:
                self._outside(storages, number, part.visits[0])
                continue
            visits = dict(zip(part.layers, part.visits, strict=True))
            upwards = range(1, self._layers + 1)
            for layer in upwards if part.layers[0] == 1 else reversed(upwards):
                self._inside(storages, number, visits[self._like(layer)], layer)
        return storages.reserved

    def _outside(self, storages: _Storages, number: int, at: int) -> None:
        for event in self._recording.visits[at].events:
            if isinstance(event, str):
                storages.end(event)
            elif isinstance(event, int):
                name = _name(self._recording, self._place, (at, event))
                for _ in range(1 + self._copies[at, event]):
                    storages.make(name, self._sizes(at)[event] + self._growth.get((at, event), 0))
            elif (layer := self._place[event[0]][1]) is not None:
                part = self._place[event[0]][0]
                for like in range(1, self._layers + 1):
                    if self._like(like) == layer:
                        storages.free((part, like, event[1]))
            else:
                for _ in range(1 + self._copies[event]):
                    storages.free(_name(self._recording, self._place, event))

    def _inside(self, storages: _Storages, number: int, at: int, layer: int) -> None:
        for event in self._recording.visits[at].events:
            if isinstance(event, str):
                storages.end(event)
            elif isinstance(event, int):
                storages.make((number, layer, event), self._sizes(at)[event])
            else:
                storages.free(self._seen_from(event, layer, self._like(layer)))

    def _seen_from(self, born: Born, layer: int, like: int) -> Name:
        """The name of a storage that layer `like` of the small model frees, where `layer` of the whole one does."""
        part, small = self._place[born[0]]
        if small is None:
            return _name(self._recording, self._place, born)
        wanted = min(max(1, layer + small - like), self._layers)
        return part, wanted, self._translated(part, small, self._like(wanted), born[1])

    def _like(self, layer: int) -> int:
        """The layer of the small model that a layer of the whole one is like."""
        if layer <= 1 + self._period:
            return layer
        if layer > 1 + self._period + self._more:
            return layer - self._more
        return 2 + (layer - 2) % self._period

    def _translated(self, part: int, small: int, like: int, index: int) -> int:
        """The number of a storage in another layer, whose first or last ones may have more or fewer."""
        if small == like:
            return index
        key = (part, small, like)
        if key not in self._translations:
            layers = self._parts[part].layers or []
            mine, theirs = (self._sizes(self._parts[part].visits[layers.index(layer)]) for layer in (small, like))
            matcher = difflib.SequenceMatcher(None, mine, theirs, autojunk=False)
            self._translations[key] = {
                block.a + step: block.b + step for block in matcher.get_matching_blocks() for step in range(block.size)
            }
        return self._translations[key].get(index, -1)

    def _sizes(self, at: int) -> list[int]:
        return self._recording.visits[at].sizes


def _places(parts: list[_Part]) -> dict[int, tuple[int, int | None]]:
    """The part and the layer of each visit."""
    return {
        at: (number, part.layers[order] if part.layers is not None else None)
        for number, part in enumerate(parts)
        for order, at in enumerate(part.visits)
    }


def _name(recording: Recording, places: dict[int, tuple[int, int | None]], born: Born) -> Name:
    """The name of a storage from outside of layers: its part, its bytes, and the part in which it dies, or -1."""
    death = recording.deaths.get(born)
    size = recording.visits[born[0]].sizes[born[1]]
    return places[born[0]][0], size, -1 if death is None else places[death][0]
