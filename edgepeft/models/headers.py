"""What a folder of safetensors holds, read from the files' headers: no weight is touched and no torch is needed.

The format: 8 bytes of little-endian header length, a JSON header, then the tensors' bytes (safetensors, version 0.3).
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import msgspec

from edgepeft.errors import BadInput

INDEX_NAME = "model.safetensors.index.json"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_LARGEST_HEADER = 100_000_000
_PICKLES = ("pytorch_model*.bin", "pytorch_model*.bin.index.json", "model*.pt", "*.pth", "*.ckpt", "consolidated*.pth")


class TensorHeader(msgspec.Struct, frozen=True):
    """One tensor of a file."""

    name: str
    """Its key in the file."""
    dtype: str
    """As safetensors writes it: F32, BF16, F16, U8, F8_E4M3 …"""
    shape: tuple[int, ...]
    """Its dimensions."""
    size_bytes: int
    """Bytes in the file."""
    begin: int
    """Where they begin, counted from the end of the header."""

    @property
    def entries(self) -> int:
        """Number of stored values."""
        count = 1
        for size in self.shape:
            count *= size
        return count


class FileHeader(msgspec.Struct, frozen=True):
    """What a safetensors file says of itself."""

    tensors: tuple[TensorHeader, ...]
    """In the order of the header."""
    metadata: dict[str, str]
    """Free words of whoever wrote it."""
    data_begin: int
    """Offset of the first tensor's bytes in the file."""
    data_end: int
    """Offset after the last tensor's bytes; the file is at least as long."""


def read_header(path: Path) -> list[TensorHeader]:
    """The tensors of one safetensors file.

    Raises:
        BadInput: the file is cut short, or is no safetensors file.
    """
    return list(read_file_header(path).tensors)


def read_file_header(path: Path) -> FileHeader:
    """The header of one safetensors file.

    Raises:
        BadInput: the file is cut short, or is no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
                raise BadInput("not a safetensors file, or only the beginning of one", where=str(path), hint=_ANEW)
            entries = json.loads(file.read(length))
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror}", where=str(path), hint=_ANEW) from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BadInput("its header is damaged", where=str(path), hint=_ANEW) from error
    tensors = []
    end = 0
    try:
        metadata = entries.pop("__metadata__", None)
        for name, entry in entries.items():
            (begin, stop), shape, dtype = entry["data_offsets"], tuple(entry["shape"]), entry["dtype"]
            if any(type(number) is not int or number < 0 for number in (begin, stop, *shape)) or begin > stop:
                raise ValueError(name)
            if not isinstance(dtype, str):
                raise TypeError(name)
            end = max(end, stop)
            tensors.append(TensorHeader(name, dtype, shape, stop - begin, begin))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput("its header is damaged", where=str(path), hint=_ANEW) from error
    if 8 + length + end > size:
        missing = 8 + length + end - size
        raise BadInput(f"the file is cut short: {missing} bytes are missing at its end", where=str(path), hint=_ANEW)
    words = metadata if isinstance(metadata, dict) else {}
    return FileHeader(tuple(tensors), words, 8 + length, 8 + length + end)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model in `folder`, sorted by name.

    Raises:
        BadInput: there are none, shards are missing, or the weights are pickles only.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise _missing_files(folder, missing, len(names))
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    found = sorted(
        path.name
        for path in folder.glob("*.safetensors")
        if path.is_file() and not path.name.startswith(("adapter_", "consolidated"))
    )
    if found:
        raise _unnamed_weights(folder, found)
    if any(any(folder.glob(pattern)) for pattern in _PICKLES):
        raise BadInput(
            "the weights are pickle files only, and reading those can run any code, so edgepeft never does",
            where=str(folder),
            hint="Take the model's safetensors files; most models have them beside the .bin files",
        )
    if (folder / "adapter_model.safetensors").is_file():
        raise BadInput(
            "this folder holds an adapter, not a base model",
            where=str(folder),
            hint="Bring it in with: edgepeft adapters import " + str(folder),
        )
    raise BadInput(
        "no weights: no *.safetensors file is in this folder",
        where=str(folder),
        hint="Check the path, or download the model anew",
    )


def read_headers(files: list[Path]) -> dict[str, TensorHeader]:
    """All tensors of a model's files, by name.

    Raises:
        BadInput: a file is cut short or damaged.
    """
    return {tensor.name: tensor for path in files for tensor in read_header(path)}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
        weight_map: dict[str, str] = dict(content["weight_map"])
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise BadInput("the list of weight files is damaged", where=str(index), hint=_ANEW) from error
    bad = [name for name in weight_map.values() if not isinstance(name, str) or Path(name).name != name]
    if not weight_map or bad:
        raise BadInput("the list of weight files is damaged", where=str(index), hint=_ANEW)
    return weight_map


def _unnamed_weights(folder: Path, found: list[str]) -> BadInput:
    """Why these files are not read: shards without their list, or a name that says nothing."""
    for name in found:
        match = _SHARD.fullmatch(name)
        if match is None:
            continue
        prefix, digits, total = match.group(1), len(match.group(2)), int(match.group(3))
        wanted = [f"{prefix}-{part:0{digits}d}-of-{match.group(3)}.safetensors" for part in range(1, total + 1)]
        return _missing_files(folder, [INDEX_NAME, *(file for file in wanted if file not in found)], total + 1)
    return BadInput(
        f"the weights are called {', '.join(found[:3])}, and model.safetensors is looked for",
        where=str(folder),
        hint="Rename the file that holds the model to model.safetensors",
    )


def _missing_files(folder: Path, missing: list[str], total: int) -> BadInput:
    shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
    return BadInput(
        f"{len(missing)} of {total} weight files are missing: {shown}",
        where=str(folder),
        hint="Bring the missing files into the folder; an interrupted download goes on where it stopped",
    )


_ANEW = "Download or copy this file anew"
