"""The tensors of sparse fine-tuning; config and papers are in edgepeft.methods.sparse.

Values are float32 [entries], their places int32 [entries], positions in the row-major matrix in ascending order. The
gradient of the values is taken out of gᵀ x, of which some rows exist at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from edgepeft.engine.kernels import has_values, one_of, split_points
from edgepeft.engine.methods.adapter import Parts
from edgepeft.engine.methods.sparse_choice import Block, Candidates, blocks_of, by_chance, by_magnitude
from edgepeft.engine.methods.sparse_files import read_parts, settings_of, written
from edgepeft.engine.methods.targets import adaptable, resolve_targets
from edgepeft.engine.model.added import AddedWeight
from edgepeft.engine.model.frozen import FrozenWeight, Workspace
from edgepeft.engine.model.linear import LinearUpdate
from edgepeft.engine.model.load import LoadedModel
from edgepeft.methods.sparse import SparseConfig

__all__ = ["SparseUpdate", "build", "restore", "settings_of"]


class SparseUpdate(LinearUpdate):
    """Trained values in some places of one matrix.

    Args:
        places: sorted, int32 [entries].
        shape: of the matrix, [out, in].
        workspace: where the changed matrix is formed.
        chooses: whether the gradients of first samples decide on the places yet.
    """

    keeps_input = replaces_weight = True
    alters = ("weight",)

    def __init__(self, places: Tensor, shape: tuple[int, int], workspace: Workspace, *, chooses: bool = False) -> None:
        self.values = nn.Parameter(torch.zeros(places.shape[0], dtype=torch.float32, device=places.device))
        self.places = places
        self.shape = shape
        self.chooses = chooses
        self._workspace = workspace
        self._candidates: Candidates | None = None
        self._blocks: list[Block] = []
        self._blocks_for = -1

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """The values."""
        return {"sparse_values": self.values}

    def named_places(self) -> dict[str, Tensor]:
        """The places, which do not change in training."""
        return {"sparse_places": self.places}

    def tensors(self) -> tuple[Tensor, ...]:
        """The values."""
        return (self.values,)

    def replace(self, weight: FrozenWeight, bias: Tensor | None, scale: float) -> tuple[FrozenWeight, Tensor | None]:
        """W + s S."""
        return AddedWeight(weight, _Scaled(self, scale), self._workspace), bias

    def add_backward(
        self, x: Tensor | None, g: Tensor, grad_x: Tensor | None, scale: float, kept: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """The entries of s gᵀ x in these places."""
        if x is None:
            return (None,)
        if self._candidates is not None:
            self._candidates.see(x, g)
            return (None,)
        found = torch.empty_like(self.values)
        for block in one_of(self._blocks_now()):
            dense = (g[:, block.rows].t() @ x).view(-1)
            found[block.inside] = dense.index_select(0, self.places[block.inside] - block.begin)
            del dense
        return (found if scale == 1 else found.mul_(scale),)

    def merge_into(self, parameter: str, values: Tensor, rows: slice) -> None:
        """W[i, j] += d for the places in these rows; see `Mergeable`."""
        columns = self.shape[1]
        begin, end = rows.start * columns, rows.stop * columns
        first, last = split_points(self.places, (begin, end), self.shape[0] * columns)
        values.view(-1).index_add_(0, self.places[first:last] - begin, self.values.detach()[first:last])

    def begin_looking(self) -> None:
        """See `ChoosesFirst`."""
        self._candidates = Candidates(self.values.numel(), self.shape, self.places.device)

    def choose(self) -> None:
        """Takes the places of the largest gradients that were seen."""
        found = None if self._candidates is None else self._candidates.chosen()
        self._candidates = None
        if found is not None:
            self.places.copy_(found)
        self.chooses = False

    def _blocks_now(self) -> list[Block]:
        if self._blocks_for != self.places._version:
            self._blocks, self._blocks_for = blocks_of(self.shape, self.places), self.places._version
        return self._blocks


class _Scaled(NamedTuple):
    """The values of an update, times a strength; see `Addition`."""

    update: SparseUpdate
    scale: float

    def add_to(self, dense: Tensor) -> None:
        """To [out, in]."""
        values = self.update.values.detach().to(dense.dtype)
        dense.view(-1).index_add_(0, self.update.places, values, alpha=self.scale)

    def add_product(self, x: Tensor, y: Tensor) -> None:
        """To y [rows, out], for x [rows, in]; summed up in float32."""
        columns, values = self.update.shape[1], self.update.values.detach()
        each = x.index_select(1, self.update.places % columns) * values
        sums = torch.zeros(y.shape, dtype=each.dtype, device=y.device)
        y += sums.index_add_(1, self.update.places // columns, each, alpha=self.scale)


def build(loaded: LoadedModel, config: SparseConfig, seed: int) -> Parts:
    """See `EngineMethod`: all values are 0. By gradients nothing can be chosen yet: places are drawn by chance, until
    training has looked at samples.

    Raises:
        UsageError: a target matches no linear layer, or a matrix has too few entries.
    """

    def places(path: str, weight: FrozenWeight, count: int) -> Tensor:
        if config.choose == "magnitude" and has_values():
            return by_magnitude(count, weight, loaded.workspace.dtype)
        return by_chance(count, weight.shape, seed, path, loaded.device)

    return _parts(loaded, config, places, chooses=config.choose == "gradient")


def restore(
    loaded: LoadedModel, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Any
) -> tuple[SparseConfig, Parts]:
    """See `EngineMethod`."""

    def places(path: str, weight: FrozenWeight, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, device=loaded.device)

    return read_parts(partial(_parts, loaded, places_of=places), settings, tensors, folder)


def _parts(
    loaded: LoadedModel,
    config: SparseConfig,
    places_of: Callable[[str, FrozenWeight, int], Tensor],
    *,
    chooses: bool = False,
) -> Parts:
    linears = loaded.linears()
    targeted = resolve_targets(config.targets, adaptable(linears))
    counts = {path: config.entries_of(path, *linears[path].weight_source.shape) for path in targeted}
    updates = {}
    for path, count in counts.items():
        weight = linears[path].weight_source
        updates[path] = SparseUpdate(places_of(path, weight, count), weight.shape, loaded.workspace, chooses=chooses)
    return Parts(updates, written=partial(written, config, updates))
