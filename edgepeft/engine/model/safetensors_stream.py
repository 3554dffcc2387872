"""Writes one safetensors file tensor by tensor, so that no more than one of them is in memory."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

_DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


class SafetensorsStream:
    """The file's header is written first, since all shapes are known; tensors then come in any order.

    The format: 8 bytes of little-endian header length, a JSON header, then the bytes of all tensors without gaps.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self._path = path
        self._dtype = dtype
        self._shapes = dict(shapes)
        self._offsets: dict[str, int] = {}
        self._missing = set(shapes)
        self._file: BinaryIO | None = None

    def __enter__(self) -> SafetensorsStream:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in self._shapes.items():
            stop = offset + math.prod(shape) * self._dtype.itemsize
            header[name] = {"dtype": _DTYPE_NAMES[self._dtype], "shape": list(shape), "data_offsets": [offset, stop]}
            self._offsets[name] = offset
            offset = stop
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._file = self._path.open("wb")
        self._file.write(struct.pack("<Q", len(encoded)) + encoded)
        self._offsets = {name: 8 + len(encoded) + begin for name, begin in self._offsets.items()}
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Rounds `tensor` to the file's dtype and writes it at its place.

        Raises:
            ValueError: the name or the shape is not what was announced.
        """
        if self._file is None or name not in self._missing or tuple(tensor.shape) != self._shapes[name]:
            expected = self._shapes.get(name)
            raise ValueError(f"tensor {name} has shape {tuple(tensor.shape)}, announced was {expected}")
        # numpy knows no bfloat16: the bytes are handed over as integers.
        content = tensor.to(self._dtype).contiguous().view(torch.int16)
        self._file.seek(self._offsets[name])
        content.reshape(-1).numpy().tofile(self._file)
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
