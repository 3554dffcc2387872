"""What a folder of safetensors holds, read from the files' headers: no weight is touched and no torch is needed.

The format: 8 bytes of little-endian header length, a JSON header, then the tensors' bytes (safetensors, version 0.3).
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import msgspec

from edgepeft.errors import BadInput

INDEX_NAME = "model.safetensors.index.json"
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

    @property
    def entries(self) -> int:
        """Number of stored values."""
        count = 1
        for size in self.shape:
            count *= size
        return count


def read_header(path: Path) -> list[TensorHeader]:
    """The tensors of one safetensors file.

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
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInput("its header is damaged", where=str(path), hint=_ANEW) from error
    tensors = []
    end = 0
    try:
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            begin, stop = entry["data_offsets"]
            end = max(end, stop)
            tensors.append(TensorHeader(name, entry["dtype"], tuple(entry["shape"]), stop - begin))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput("its header is damaged", where=str(path), hint=_ANEW) from error
    if 8 + length + end > size:
        missing = 8 + length + end - size
        raise BadInput(f"the file is cut short: {missing} bytes are missing at its end", where=str(path), hint=_ANEW)
    return tensors


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
            shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
            raise BadInput(
                f"{len(missing)} of {len(names)} weight files are missing: {shown}",
                where=str(folder),
                hint="Bring the missing files into the folder; an interrupted download goes on where it stopped",
            )
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    found = sorted(
        path
        for path in folder.glob("*.safetensors")
        if path.is_file() and not path.name.startswith(("adapter_", "consolidated"))
    )
    if found:
        return _complete_shards(folder, found)
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


def _complete_shards(folder: Path, found: list[Path]) -> list[Path]:
    """Checks the names `…-00002-of-00005.safetensors` when there is no index."""
    names = {path.name for path in found}
    for path in found:
        stem, separator, total = path.stem.rpartition("-of-")
        prefix, dash, number = stem.rpartition("-")
        if not (separator and dash and total.isdigit() and number.isdigit()):
            continue
        wanted = [f"{prefix}-{part:0{len(number)}d}-of-{total}.safetensors" for part in range(1, int(total) + 1)]
        missing = [name for name in wanted if name not in names]
        if missing:
            raise BadInput(
                f"{len(missing)} of {len(wanted)} weight files are missing: {', '.join(missing[:4])}",
                where=str(folder),
                hint="Bring the missing files into the folder; an interrupted download goes on where it stopped",
            )
    return found


_ANEW = "Download or copy this file anew"
