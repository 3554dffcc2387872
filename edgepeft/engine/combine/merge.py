"""A base's weights with an adapter's update in them, tensor by tensor: no more than one matrix is in memory.

What an update makes of a parameter is its method's to say (`Mergeable`); it is computed in float32 and the result is
rounded once. Merging into 4-bit codes would round most of a small update away (1 % of one of relative size 0.5 % is
left), so what comes out is always 16 or 32 bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edgepeft.engine.combine.base_files import BaseFiles, StoredTensor, locate
from edgepeft.engine.heap import trim_heap
from edgepeft.engine.methods import AttachedAdapter
from edgepeft.engine.methods.adapter import Mergeable
from edgepeft.engine.model.load import LoadedModel
from edgepeft.errors import BadInput

_PART_ENTRIES = 1 << 21


class Change(NamedTuple):
    """What becomes of one tensor of the base."""

    update: Mergeable
    parameter: str
    """Of the update's module."""


def changes_of(adapter: AttachedAdapter, outline: LoadedModel, files: BaseFiles, where: str) -> dict[str, Change]:
    """What the adapter changes, by the names that the base's files have for it.

    Args:
        adapter: read onto the outline.
        outline: of the base.
        files: of the base.
        where: the adapter, for messages.

    Raises:
        BadInput: an update cannot be part of the weights, adds to a bias that the base does not have, changes one of
            two things that the base has as one table, or what the files hold under no name that is known.
    """
    _check_mergeable(adapter, where)
    spared = _second_names(adapter, outline, files, where)
    modules = {path: outline.model.get_submodule(path) for path in adapter.updates if path not in spared}
    names = locate(modules, files.tensors, where)
    found: dict[str, Change] = {}
    for path, module in modules.items():
        update: Any = adapter.updates[path]
        has = {"weight", *(name for name, _ in module.named_parameters(recurse=False))}
        altered = [parameter for parameter in update.alters if parameter in has]
        if not altered:
            raise BadInput(
                f"it adds a {update.alters[0]} to {path}, which has none in this base",
                where=where,
                hint="Use the adapter beside its base, as chat does, or train --method norm",
            )
        for parameter in altered:
            found[names[path].removesuffix("weight") + parameter] = Change(update, parameter)
    if missing := [name for name in found if name not in files.tensors]:
        raise BadInput(f"tensor {missing[0]}, which it changes, is in none of the base's files", where=where)
    return found


def _check_mergeable(adapter: AttachedAdapter, where: str) -> None:
    for path, update in adapter.updates.items():
        if not isinstance(update, Mergeable):
            raise BadInput(
                f"its update of {path} is a {type(update).__name__}, which cannot be merged into weights",
                where=where,
                hint="Use the adapter beside its base, as chat does",
            )


def _second_names(adapter: AttachedAdapter, outline: LoadedModel, files: BaseFiles, where: str) -> set[str]:
    """Paths of tables that the files hold under another name: a head that is the embedding is there once, seldom twice.

    Raises:
        BadInput: the base has one table for both, and the adapter does not replace both with one.
    """
    tables = outline.tables()
    if len({id(table.own) for table in tables.values()}) == len(tables) or not tables.keys() & adapter.updates.keys():
        return set()
    updates: list[Any] = [adapter.updates.get(path) for path in tables]
    if None in updates or len({id(update.tensors()[0]) for update in updates}) > 1:
        raise BadInput(
            "it changes embedding and output head in different ways, and this base has one table for both",
            where=where,
            hint="Use the adapter beside its base, as chat does",
        )
    held = {name.removesuffix(".weight").rsplit(".", 1)[-1] for name in files.tensors}
    embedding = outline.model.get_input_embeddings()
    return {
        path for path, table in tables.items() if table.module is not embedding and path.rsplit(".", 1)[-1] not in held
    }


class MergedWeights:
    """The tensors of a merged model under the names that the base's files have for them.

    Args:
        files: of the base.
        changes: by the adapter, from `changes_of`.
        dtype: of the result.
        trained: name of a tensor → gives the values that updates are added to instead of those in the files; all of
            these tensors then take part.
    """

    def __init__(
        self,
        files: BaseFiles,
        changes: Mapping[str, Change],
        dtype: torch.dtype,
        trained: Mapping[str, Callable[[], Tensor]] | None = None,
    ) -> None:
        self._files, self._changes, self._trained = files, changes, trained or {}
        # What is asked for in the dtype that the base has is copied bit for bit, its float32 rarities included.
        self._keeps_others = dtype == main_dtype(files)
        self.dtype = dtype
        self.tensors = {name: self._form(name, tensor) for name, tensor in files.tensors.items()}
        """Shape and dtype of each tensor."""

    @property
    def changed(self) -> int:
        """How many tensors are not copies."""
        return len(self._changes.keys() | self._trained.keys())

    def parts(self, name: str, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
        """A tensor in parts along its first dimension, in its dtype or another one.

        Raises:
            BadInput: values are not finite, or too large for the dtype.
        """
        wanted = dtype or self.tensors[name].dtype
        if self._is_copy(name):
            for part in self._files.parts(name):
                yield part if part.dtype == wanted else _rounded(part, wanted, name)
            return
        change, start = self._changes.get(name), 0
        for source in self._source(name):
            part = source.to(torch.float32, copy=True)
            del source
            if change is not None:
                with torch.no_grad():
                    change.update.merge_into(change.parameter, part, slice(start, start + len(part)))
            start += len(part)
            yield _rounded(part, wanted, name)
        trim_heap()

    def _is_copy(self, name: str) -> bool:
        return name not in self._changes and name not in self._trained

    def _source(self, name: str) -> Iterator[Tensor]:
        values = self._trained.get(name)
        for part in self._files.parts(name) if values is None else iter([values()]):
            yield from part.split(max(1, _PART_ENTRIES // math.prod(part.shape[1:])))

    def _form(self, name: str, stored: StoredTensor) -> StoredTensor:
        kept = self._is_copy(name) and not stored.packed and self._keeps_others
        if kept or not stored.dtype.is_floating_point:
            return stored
        return StoredTensor(stored.shape, self.dtype, False)


def main_dtype(files: BaseFiles) -> torch.dtype | None:
    """The dtype of most of the base's values; None where they are packed."""
    entries: dict[torch.dtype | None, int] = {}
    for tensor in files.tensors.values():
        key = None if tensor.packed else tensor.dtype
        entries[key] = entries.get(key, 0) + torch.Size(tensor.shape).numel()
    return max(entries, key=lambda dtype: entries[dtype])


def _rounded(part: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    out = part.to(dtype)
    if bool(torch.isfinite(out).all()):
        return out
    if bool(torch.isfinite(part).all()):
        raise BadInput(
            f"tensor {name} holds values beyond the range of {str(dtype).removeprefix('torch.')}",
            hint="Write safetensors with --dtype bf16 or fp32",
        )
    raise BadInput(f"tensor {name} holds values that are not finite numbers", hint="Take the base and adapter anew")
