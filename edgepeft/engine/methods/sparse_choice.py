"""Which entries of a matrix a sparse adapter trains: by chance, by magnitude, or by the gradients of first samples.

Places are positions in the row-major entries, int32 in ascending order. However an entry is chosen, memory is bounded
by some blocks of rows and by the number of entries that are wanted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from edgepeft.engine.kernels import has_values, one_of, split_points
from edgepeft.engine.methods.seeds import generator_of
from edgepeft.engine.model.frozen import FrozenWeight
from edgepeft.memory.chunks import CPU_CHUNK
from edgepeft.methods.sparse import block_rows

CANDIDATES = 2
"""Places that are remembered while samples are looked at, over those that are wanted."""


class Block(NamedTuple):
    """Some rows of a matrix, and which of the sorted places lie in them."""

    rows: slice
    begin: int
    """The first entry of these rows."""
    inside: slice
    """Of the places."""


def blocks_of(shape: tuple[int, int], places: Tensor) -> list[Block]:
    """A matrix in blocks of rows.

    Args:
        shape: [out, in].
        places: sorted.
    """
    out_features, in_features = shape
    step = block_rows(out_features, in_features)
    starts = list(range(0, out_features, step))
    ends = [min(start + step, out_features) for start in starts]
    points = [0, *split_points(places, [end * in_features for end in ends], out_features * in_features)]
    return [
        Block(slice(start, end), start * in_features, slice(low, high))
        for start, end, low, high in zip(starts, ends, points, points[1:], strict=False)
    ]


def by_chance(count: int, shape: tuple[int, int], seed: int, name: str, device: torch.device) -> Tensor:
    """`count` distinct places, every set of them as likely as every other; memory goes with `count`."""
    size = shape[0] * shape[1]
    if not has_values():
        return torch.arange(count, dtype=torch.int32, device=device)
    generator = generator_of(seed, name)
    if 4 * count >= size:
        places = torch.randperm(size, generator=generator)[:count]
    else:
        found = torch.empty(0, dtype=torch.int64)
        while found.numel() < count:
            drawn = torch.randint(size, (count + count // 4 + 16,), generator=generator)
            found = torch.cat([found, drawn]).unique()
        places = found[torch.randperm(found.numel(), generator=generator)[:count]]
    return places.sort().values.to(device, torch.int32)


def by_magnitude(count: int, weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
    """The places of the largest |W|, of the values that products in `dtype` see; one dense matrix at a time."""
    dense = weight.materialize(torch.empty(weight.shape, dtype=dtype, device=weight.device)).view(-1)
    best = _Best(count, weight.device)
    best.see(dense.abs_(), 0)
    return best.places.sort().values.to(torch.int32)


class Candidates:
    """Entries with large gradients, and the sums of these magnitudes over the samples that were looked at.

    An entry counts from the sample on at which its gradient belongs to the largest; `CANDIDATES` times as many as are
    wanted are followed, so none that is large more than once is missed. No dense gradient is ever summed up.

    Args:
        count: of entries that are wanted.
        shape: of the matrix, [out, in].
        device: of the model.
    """

    def __init__(self, count: int, shape: tuple[int, int], device: torch.device) -> None:
        self._count = count
        self._shape = shape
        self._most = min(CANDIDATES * count, shape[0] * shape[1])
        self._scores = torch.empty(0, dtype=torch.float32, device=device)
        self._places = torch.empty(0, dtype=torch.int32, device=device)

    def see(self, x: Tensor, g: Tensor) -> None:
        """Adds |gᵀ x|, for x [tokens, in] and g [tokens, out] of one sample."""
        new = _Best(self._most, self._places.device)
        for block in blocks_of(self._shape, self._places):
            # A gradient that overflowed tells nothing.
            found = (g[:, block.rows].t() @ x).view(-1).abs_().nan_to_num_(nan=0.0, posinf=0.0)
            known = self._places[block.inside] - block.begin
            self._scores[block.inside] += found.index_select(0, known)
            # Those are there already.
            found.index_fill_(0, known.long(), -1)
            new.see(found, block.begin)
        fresh = new.scores >= 0
        scores = torch.cat([self._scores, new.scores[fresh].float()])
        places = torch.cat([self._places, new.places[fresh].to(torch.int32)])
        self._keep(scores, places, self._most)

    def chosen(self) -> Tensor | None:
        """The places with the largest sums; None where no sample was looked at."""
        if self._places.numel() < self._count:
            return None
        self._keep(self._scores, self._places, self._count)
        return self._places

    def _keep(self, scores: Tensor, places: Tensor, most: int) -> None:
        if scores.numel() > most:
            scores, order = scores.topk(most, sorted=False)
            places = places[order]
        self._places, order = places.sort()
        self._scores = scores[order]


class _Best:
    """The largest of many values, which come piece by piece."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._count = count
        self.scores = torch.empty(0, device=device)
        self.places = torch.empty(0, dtype=torch.int64, device=device)

    def see(self, values: Tensor, begin: int) -> None:
        """Values [n] at the places from `begin` on."""
        for start in one_of(range(0, values.numel(), CPU_CHUNK)):
            part = values[start : start + CPU_CHUNK]
            scores, places = part.topk(min(self._count, part.numel()), sorted=False)
            self.scores = torch.cat([self.scores.to(scores.dtype), scores])
            self.places = torch.cat([self.places, places + (begin + start)])
            if self.scores.numel() > self._count:
                self.scores, order = self.scores.topk(self._count, sorted=False)
                self.places = self.places[order]
