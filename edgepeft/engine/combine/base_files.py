"""A base's weights as values, read tensor by tensor from its files, in whatever form they are stored there.

Nothing is kept and nothing is memory-mapped: what is read is in memory of its own until its reader lets go of it. Data
quantized by bitsandbytes or as FP8 appears under the name and with the shape of its values; the tensors that describe
it do not appear.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edgepeft.engine.model.checkpoint import dense_values, four_bit_weight
from edgepeft.engine.model.frozen import FrozenWeight, Int8Weight, Workspace, bitsandbytes_functional
from edgepeft.engine.model.safetensors_stream import DTYPE_NAMES
from edgepeft.errors import BadInput
from edgepeft.library.tensors import from_layers, in_other_tower
from edgepeft.models.headers import TensorHeader, read_file_header, weight_files
from edgepeft.models.source_folder import read_json
from edgepeft.models.store import ModelEntry

DTYPES_BY_NAME = {name: dtype for dtype, name in DTYPE_NAMES.items()} | {"F8_E4M3": torch.float8_e4m3fn}
READABLE = frozenset({"fp32", "bf16", "fp16", "bnb-4bit", "bnb-8bit", "fp8"})
"""Forms of storage whose values can be read tensor by tensor."""

_PART_BYTES = 1 << 23
_STATE = ".quant_state.bitsandbytes__"
_COMPANIONS = re.compile(
    r"\.(weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)"
    r"|SCB|weight_format|weight_scale_inv|activation_scale|input_scale)$"
)


class _Place(NamedTuple):
    path: Path
    begin: int
    """Offset of its first byte in the file."""
    header: TensorHeader


class StoredTensor(NamedTuple):
    """One tensor of a base."""

    shape: tuple[int, ...]
    """Of its values."""
    dtype: torch.dtype
    """In the file; float32 for what is dequantized."""
    packed: bool
    """Whether the file holds codes instead of values."""


class BaseFiles:
    """The tensors of a base, in the order of its files.

    Raises:
        BadInput: files are missing or damaged, or their form cannot be read tensor by tensor.
    """

    def __init__(self, entry: ModelEntry) -> None:
        if entry.stored_as not in READABLE:
            raise BadInput(
                f"its weights are stored as {entry.stored_as}, which cannot be merged into yet",
                where=entry.name,
                hint="Train and merge on the 16-bit version of the model",
            )
        self._where = entry.weights
        self._places: dict[str, _Place] = {}
        for path in weight_files(Path(entry.weights)):
            file = read_file_header(path)
            for header in file.tensors:
                self._places[header.name] = _Place(path, file.data_begin + header.begin, header)
        config = read_json(Path(entry.folder) / "config.json")
        settings = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
        self._settings: Mapping[str, Any] = settings or {}
        self._workspace = Workspace(torch.device("cpu"), torch.float32)

    @functools.cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by its name in the files."""
        found: dict[str, StoredTensor] = {}
        for name, place in self._places.items():
            if _COMPANIONS.search(name):
                continue
            dtype = DTYPES_BY_NAME.get(place.header.dtype)
            if dtype is None:
                raise BadInput(
                    f"tensor {name} is of the dtype {place.header.dtype}, which cannot be read here", where=self._where
                )
            packed = self._is_packed(name, dtype)
            shape = self._four_bit_shape(name) if self._state_name(name) else place.header.shape
            found[name] = StoredTensor(shape, torch.float32 if packed else dtype, packed)
        return found

    def read(self, name: str) -> Tensor:
        """The values of a tensor: in the file's dtype, or float32 where they are dequantized."""
        if not self.tensors[name].packed:
            return self._raw(name)
        weight = self.packed(name, self._workspace)
        return dense_values(weight) if weight is not None else self._from_fp8(name)

    def parts(self, name: str) -> Iterator[Tensor]:
        """The values in parts of some megabytes along the first dimension, those of packed data at once."""
        tensor = self.tensors[name]
        if tensor.packed or not tensor.shape or math.prod(tensor.shape) == 0:
            yield self.read(name)
            return
        row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
        step = max(1, _PART_BYTES // row_bytes)
        place = self._places[name]
        for start in range(0, tensor.shape[0], step):
            rows = min(step, tensor.shape[0] - start)
            part = torch.empty((rows, *tensor.shape[1:]), dtype=tensor.dtype)
            self._fill(part, place, start * row_bytes)
            yield part

    def packed(self, name: str, workspace: Workspace) -> FrozenWeight | None:
        """What bitsandbytes packed, as it is; None for anything else."""
        if self._state_name(name):
            codes, state = self._raw(name), self._quant_state(name)
            return four_bit_weight(codes, state, workspace)
        scales = name.removesuffix("weight") + "SCB"
        if self.tensors[name].packed and scales in self._places:
            return Int8Weight(self._raw(name), self._raw(scales).float().reshape(-1), workspace)
        return None

    def _is_packed(self, name: str, dtype: torch.dtype) -> bool:
        eight_bit = dtype == torch.int8 and name.removesuffix("weight") + "SCB" in self._places
        return bool(self._state_name(name)) or eight_bit or dtype == torch.float8_e4m3fn

    def _state_name(self, name: str) -> str | None:
        return next((key for kind in ("nf4", "fp4") if (key := f"{name}{_STATE}{kind}") in self._places), None)

    def _four_bit_shape(self, name: str) -> tuple[int, ...]:
        key = self._state_name(name)
        assert key is not None
        try:
            return tuple(int(size) for size in json.loads(bytes(self._raw(key).tolist()))["shape"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"tensor {key} is damaged", where=self._where, hint=_ANEW) from error

    def _quant_state(self, name: str) -> Any:
        parts = {key.removeprefix(f"{name}."): self._raw(key) for key in self._places if key.startswith(f"{name}.")}
        return bitsandbytes_functional().QuantState.from_dict(parts, torch.device("cpu"))

    def _from_fp8(self, name: str) -> Tensor:
        """One scale for each block of rows and columns, or one for all: DeepSeek-V3 (arXiv 2412.19437), 3.3.2."""
        scale_name = f"{name}_scale_inv"
        if scale_name not in self._places:
            raise BadInput(f"tensor {scale_name} is missing", where=self._where, hint=_ANEW)
        values, scales = self._raw(name).float(), self._raw(scale_name).float()
        if scales.dim() == 2:
            rows, columns = self._settings.get("weight_block_size") or (128, 128)
            scales = scales.repeat_interleave(rows, 0)[: values.shape[0]]
            for start in range(0, values.shape[1], columns):
                values[:, start : start + columns] *= scales[:, start // columns, None]
            return values
        return values.mul_(scales)

    def _raw(self, name: str) -> Tensor:
        place = self._places[name]
        tensor = torch.empty(place.header.shape, dtype=DTYPES_BY_NAME[place.header.dtype])
        self._fill(tensor, place, 0)
        return tensor

    def _fill(self, tensor: Tensor, place: _Place, offset: int) -> None:
        left = tensor.reshape(-1).view(torch.uint8).numpy().data
        try:
            with place.path.open("rb", buffering=0) as file:
                file.seek(place.begin + offset)
                while left:
                    # A system reads no more than 2 GiB at a time.
                    got = file.readinto(left)
                    if not got:
                        raise BadInput(f"ends inside of tensor {place.header.name}", where=str(place.path), hint=_ANEW)
                    left = left[got:]
        except OSError as error:
            raise BadInput(f"cannot be read: {error.strerror}", where=str(place.path), hint=_ANEW) from error


def locate(paths: Iterable[str], names: Iterable[str], where: str) -> dict[str, str]:
    """Path of a linear, a norm or a table in transformers' model → name of its weight in the files.

    Both are alike, except that a language tower lies under other prefixes in the files of a vision-language model.

    Raises:
        BadInput: a module's weight is in none of the files, or could be one of several.
    """
    known = list(names)
    by_ending: dict[str, list[str]] = {}
    for name in known:
        if not in_other_tower(name):
            by_ending.setdefault(_ending(name), []).append(name)
    exact = set(known)
    found = {}
    for path in paths:
        name = f"{path}.weight"
        others = by_ending.get(_ending(name), [])
        if name not in exact and len(others) != 1:
            raise BadInput(f"tensor {name} is not found under that name in its files", where=where, hint=_ANEW)
        found[path] = name if name in exact else others[0]
    return found


def _ending(name: str) -> str:
    """What of a weight's name does not depend on where the language tower lies."""
    return from_layers(name) if "layers." in name else ".".join(name.rsplit(".", 2)[-2:])


_ANEW = "Take the model's files anew from where they came from"
