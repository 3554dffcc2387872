"""The first facts of a GGUF file, read without loading it: enough to say whether it can be used.

The format (GGUF version 2 and 3): magic, version, tensor count, pair count, then the pairs: key, type, value; all
little-endian, strings with an 8-byte length before them.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from edgepeft.errors import BadInput

CONVERTIBLE = frozenset(
    {"llama", "mistral", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "phi3", "gemma2", "gemma3", "stablelm", "starcoder2"}
)
"""Values of `general.architecture` that can be converted."""
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_LONGEST_STRING = 1 << 24


def gguf_architecture(path: Path) -> str:
    """The value of `general.architecture`.

    Raises:
        BadInput: the file is no GGUF, is cut short, or does not say its architecture.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise BadInput("not a GGUF file", where=str(path), hint="Give the folder or the .gguf file of a model")
            version, _, pairs = struct.unpack("<IQQ", _exactly(file, 20))
            if version not in (2, 3):
                raise BadInput(f"GGUF version {version} is not supported", where=str(path), hint="Versions 2 and 3 are")
            for _ in range(pairs):
                key = _string(file)
                kind = struct.unpack("<I", _exactly(file, 4))[0]
                if key == "general.architecture" and kind == _STRING:
                    return _string(file)
                _skip(file, kind)
    except (EOFError, ValueError, KeyError, OSError) as error:
        raise BadInput("not a complete GGUF file", where=str(path), hint="Copy or download the file anew") from error
    raise BadInput("the file does not say its architecture", where=str(path), hint="Copy or download the file anew")


def check_convertible(path: Path) -> None:
    """Checks that the GGUF at `path` is of an architecture that can be converted.

    Raises:
        BadInput: it is not.
    """
    architecture = gguf_architecture(path)
    if architecture not in CONVERTIBLE:
        raise BadInput(
            f"GGUF files of the architecture {architecture!r} cannot be converted",
            where=str(path),
            hint="Bring the model's original safetensors folder instead: edgepeft models add DIR",
        )


def _exactly(file: BinaryIO, count: int) -> bytes:
    content = file.read(count)
    if len(content) < count:
        raise EOFError
    return content


def _string(file: BinaryIO) -> str:
    length = struct.unpack("<Q", _exactly(file, 8))[0]
    if length > _LONGEST_STRING:
        raise ValueError("a string of impossible length")
    return _exactly(file, length).decode("utf-8", errors="replace")


def _skip(file: BinaryIO, kind: int) -> None:
    if kind == _STRING:
        _string(file)
    elif kind == _ARRAY:
        inner, count = struct.unpack("<IQ", _exactly(file, 12))
        if inner in _SCALARS:
            file.seek(count * struct.calcsize(_SCALARS[inner]), 1)
        else:
            for _ in range(count):
                _skip(file, inner)
    else:
        _exactly(file, struct.calcsize(_SCALARS[kind]))
