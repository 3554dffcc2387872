"""Reading a base's quantized linears from their stored copy; see `models.quantized_copy`."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from edgepeft.engine.model.copy_layout import (
    MAP,
    Form,
    Shapes,
    bytes_of,
    checksum,
    settings_for,
    tensors_of,
    tensors_of_all,
)
from edgepeft.engine.model.frozen import FrozenWeight, Int8Weight, Nf4Weight, Workspace
from edgepeft.engine.model.safetensors_stream import DTYPE_NAMES
from edgepeft.errors import EdgepeftError
from edgepeft.models.headers import FileHeader
from edgepeft.models.quantized_copy import CopyPrecision, CopyUnusableError, copy_path, read_copy_header
from edgepeft.models.store import ModelEntry, verify_unchanged
from edgepeft.spec import Precision


def open_copy(entry: ModelEntry, precision: Precision, shapes: Shapes, workspace: Workspace) -> CopyReader | None:
    """The stored copy for this load; None when there is none.

    Raises:
        CopyUnusableError: there is one that must not be used.
    """
    settings = settings_for(entry, precision, workspace)
    if settings is None:
        return None
    path = copy_path(entry, settings)
    header = read_copy_header(path, settings)
    if header is None:
        return None
    try:
        verify_unchanged(entry)
    except EdgepeftError as error:
        raise CopyUnusableError(error.what) from error
    return CopyReader(header, path, shapes, settings.precision, workspace)


class CopyReader:
    """Hands out the matrices of a stored copy, each read once into memory of its own.

    Args:
        header: of the copy; checked to be of this source and these settings.
        path: of the copy.
        shapes: of the linears that it must hold, no more and no fewer.
        precision: of the copy.
        workspace: shared by all linears; its device is where they end up.

    Raises:
        CopyUnusableError: it holds other tensors, or values in another code.
    """

    def __init__(
        self, header: FileHeader, path: Path, shapes: Shapes, precision: CopyPrecision, workspace: Workspace
    ) -> None:
        self._precision, self._shapes, self._workspace = precision, shapes, workspace
        self._begin = header.data_begin
        self._tensors = {tensor.name: tensor for tensor in header.tensors}
        expected = tensors_of_all(precision, shapes)
        for name, (dtype, shape) in expected.items():
            found = self._tensors.get(name)
            size = math.prod(shape) * dtype.itemsize
            if found is None:
                raise CopyUnusableError(f"it has no tensor {name}")
            if (found.dtype, found.shape, found.size_bytes) != (DTYPE_NAMES[dtype], shape, size):
                raise CopyUnusableError(f"tensor {name} has another shape or dtype")
            if type(found.begin) is not int or found.begin < 0:
                raise CopyUnusableError(f"tensor {name} has no place in it")
        if len(expected) != len(self._tensors):
            raise CopyUnusableError("it holds more tensors than the model has")
        try:
            # Unbuffered: tensors are read straight into their own memory.
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise CopyUnusableError(f"it cannot be read: {error.strerror}") from error

    def __enter__(self) -> CopyReader:
        try:
            if self._precision == "nf4":
                values = self._read(MAP, tensors_of_all("nf4", {})[MAP])
                if not torch.equal(values, self._workspace.dynamic_map.cpu()):
                    raise CopyUnusableError("its scales are in another 8-bit code")
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, path: str) -> FrozenWeight:
        """The frozen weight of the linear at `path`.

        Raises:
            CopyUnusableError: its bytes are damaged, or cannot be read.
        """
        shape = self._shapes[path]
        forms = tensors_of(self._precision, path, shape)
        *parts, written = [self._read(name, form) for name, form in forms.items()]
        if bytes(bytes_of(written)) != checksum(parts):
            raise CopyUnusableError(f"the bytes of {path} are damaged")
        held = [part.to(self._workspace.device) for part in parts]
        if self._precision == "int8":
            codes, absmax = held
            return Int8Weight(codes, absmax, self._workspace)
        packed, absmax, nested, offset = held
        return Nf4Weight(packed, absmax, (nested, self._workspace.dynamic_map, offset), shape, self._workspace)

    def _read(self, name: str, form: Form) -> Tensor:
        dtype, shape = form
        tensor = torch.empty(shape, dtype=dtype)
        left = bytes_of(tensor)
        try:
            self._file.seek(self._begin + self._tensors[name].begin)
            while left:
                # A system reads no more than 2 GiB at a time.
                got = self._file.readinto(left)
                if not got:
                    raise CopyUnusableError(f"it ends inside of tensor {name}")
                left = left[got:]
        except OSError as error:
            raise CopyUnusableError(f"it cannot be read: {error.strerror}") from error
        return tensor
