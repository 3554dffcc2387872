"""A base's weights with an adapter's update added, tensor by tensor: no more than one matrix is in memory.

Updates are added in float32 and the result is rounded once. Merging into 4-bit codes would round most of a small update
away (1 % of one of relative size 0.5 % is left), so what comes out is always 16 or 32 bit.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from edgepeft.engine.combine.base_files import BaseFiles, StoredTensor
from edgepeft.engine.combine.outline import Values
from edgepeft.engine.methods import AttachedAdapter
from edgepeft.errors import BadInput

_PART_ENTRIES = 1 << 21


@runtime_checkable
class Mergeable(Protocol):
    """An update of a linear that can become part of its weight; a PEFT method says so by having this."""

    def merge_into(self, values: Tensor, rows: slice) -> None:
        """Changes these rows of W, `values` of float32 [rows, in], in place to what they are with the update."""
        ...


def updates_of(adapter: AttachedAdapter, linears: Container[str], where: str) -> dict[str, Mergeable]:
    """The adapter's updates by the path of their linear.

    Args:
        adapter: read onto its base.
        linears: paths of the base's decoder linears.
        where: the adapter, for messages.

    Raises:
        BadInput: one of them cannot be part of a linear's weight.
    """
    found: dict[str, Mergeable] = {}
    for path, update in adapter.updates.items():
        if path not in linears or not isinstance(update, Mergeable):
            raise BadInput(
                f"its update of {path} is a {type(update).__name__}, which cannot be merged into weights",
                where=where,
                hint="Use the adapter beside its base, as chat does",
            )
        found[path] = update
    return found


class MergedWeights:
    """The tensors of a merged model under the names that the base's files have for them.

    Args:
        files: of the base.
        updates: of the adapter, by the path of their linear.
        names: path of each decoder linear → name of its weight in the files.
        dtype: of the result.
        values: what updates are added to, instead of the values in the files; every decoder linear then takes part.
    """

    def __init__(
        self,
        files: BaseFiles,
        updates: Mapping[str, Mergeable],
        names: Mapping[str, str],
        dtype: torch.dtype,
        values: Values | None = None,
    ) -> None:
        self._files, self._updates, self._values = files, updates, values
        self._paths = {name: path for path, name in names.items() if values is not None or path in updates}
        # What is asked for in the dtype that the base has is copied bit for bit, its float32 rarities included.
        self._keeps_others = dtype == main_dtype(files)
        self.dtype = dtype
        self.tensors = {name: self._form(name, tensor) for name, tensor in files.tensors.items()}
        """Shape and dtype of each tensor."""

    @property
    def changed(self) -> int:
        """How many tensors are not copies."""
        return len(self._paths)

    def parts(self, name: str, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
        """A tensor in parts along its first dimension, in its dtype or another one.

        Raises:
            BadInput: values are not finite, or too large for the dtype.
        """
        wanted = dtype or self.tensors[name].dtype
        path = self._paths.get(name)
        if path is None:
            for part in self._files.parts(name):
                yield part if part.dtype == wanted else _rounded(part, wanted, name)
            return
        update, start = self._updates.get(path), 0
        for source in self._source(path, name):
            part = source.to(torch.float32, copy=True)
            del source
            if update is not None:
                update.merge_into(part, slice(start, start + len(part)))
            start += len(part)
            yield _rounded(part, wanted, name)

    def _source(self, path: str, name: str) -> Iterator[Tensor]:
        parts = self._files.parts(name) if self._values is None else iter([self._values(path)])
        for part in parts:
            yield from part.split(max(1, _PART_ENTRIES // part.shape[1]))

    def _form(self, name: str, stored: StoredTensor) -> StoredTensor:
        kept = name not in self._paths and not stored.packed and self._keeps_others
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
