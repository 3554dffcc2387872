"""Writes one safetensors file tensor by tensor, so that no more than one of them is in memory."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

DTYPE_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.bool: "BOOL",
}
"""What safetensors calls the dtypes that are written here."""


class SafetensorsStream:
    """The file's header is written first, since all shapes are known; tensors then come in any order.

    The format: 8 bytes of little-endian header length, a JSON header, then the bytes of all tensors without gaps.

    Args:
        path: of the file.
        shapes: of all tensors by name, in the file's order.
        dtype: of all of them, or of each by name.
        metadata: words for the header.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype | Mapping[str, torch.dtype],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._path = path
        self._dtypes = dict.fromkeys(shapes, dtype) if isinstance(dtype, torch.dtype) else dict(dtype)
        self._metadata = {"format": "pt", **(metadata or {})}
        self._shapes = dict(shapes)
        self._offsets: dict[str, int] = {}
        self._missing = set(shapes)
        self._file: BinaryIO | None = None

    def __enter__(self) -> SafetensorsStream:
        header: dict[str, object] = {"__metadata__": self._metadata}
        offset = 0
        for name, shape in self._shapes.items():
            dtype = self._dtypes[name]
            stop = offset + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
            self._offsets[name] = offset
            offset = stop
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._file = self._path.open("wb")
        self._file.write(struct.pack("<Q", len(encoded)) + encoded)
        self._offsets = {name: 8 + len(encoded) + begin for name, begin in self._offsets.items()}
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Rounds `tensor`, on the CPU, to its dtype in the file and writes it at its place.

        Raises:
            ValueError: the name or the shape is not what was announced.
        """
        if self._file is None or name not in self._missing or tuple(tensor.shape) != self._shapes[name]:
            expected = self._shapes.get(name)
            raise ValueError(f"tensor {name} has shape {tuple(tensor.shape)}, announced was {expected}")
        # numpy knows no bfloat16: the bytes are handed over as integers.
        content = tensor.to(self._dtypes[name]).contiguous().reshape(-1).view(torch.uint8)
        self._file.seek(self._offsets[name])
        self._file.write(content.numpy().data)
        self._missing.discard(name)

    def write_parts(self, name: str, parts: Iterable[torch.Tensor]) -> None:
        """Writes a tensor that comes in parts along its first dimension, in their order, on the CPU.

        Raises:
            ValueError: the name was not announced, or the parts are not all of the tensor.
        """
        if self._file is None or name not in self._missing:
            raise ValueError(f"tensor {name} was not announced, or is there already")
        shape, dtype = self._shapes[name], self._dtypes[name]
        self._file.seek(self._offsets[name])
        entries = 0
        for part in parts:
            if tuple(part.shape[1:]) != shape[1:]:
                raise ValueError(f"a part of tensor {name} has shape {tuple(part.shape)}, announced was {shape}")
            entries += part.numel()
            if entries > math.prod(shape):
                raise ValueError(f"tensor {name} has more parts than the announced {shape}")
            self._file.write(part.to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if entries != math.prod(shape):
            raise ValueError(f"{entries} entries of tensor {name} came, announced was {shape}")
        self._missing.discard(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        try:
            if kind is None:
                if self._missing:
                    raise ValueError(
                        f"{len(self._missing)} tensors were never written, among them {min(self._missing)}"
                    )
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
