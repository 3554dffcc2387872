"""What a stored copy holds of each quantized linear: the tensors of its `FrozenWeight`, and a checksum.

Under the linear's path: `PATH.weight`, the codes as they are held; `PATH.weight.absmax`, and for NF4 `….nested_absmax`
and `….nested_offset`, what turns them into values; `PATH.weight.crc32`, four bytes against a failing disk.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from edgepeft.engine.kernels import target_of
from edgepeft.engine.model.frozen import FrozenWeight, Int8Weight, Nf4Weight, Workspace
from edgepeft.memory.chunks import ABSMAX_BLOCK, NF4_BLOCK
from edgepeft.models.quantized_copy import CopyPrecision, CopySettings, copy_settings
from edgepeft.models.store import ModelEntry
from edgepeft.spec import Precision

Shapes = Mapping[str, tuple[int, int]]
"""[out, in] of each linear by its path, in the model's order."""
Form = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of a stored tensor."""

MAP = "absmax_map"
"""The tensor with the 256 values of the 8-bit dynamic type, once for all matrices in NF4."""
CHECKSUM = ".weight.crc32"


def settings_for(entry: ModelEntry, precision: Precision, workspace: Workspace) -> CopySettings | None:
    """The settings of the copy that this load makes or uses; None where there is nothing to store."""
    return copy_settings(entry, precision, target_of(workspace.device).kind)


def tensors_of_all(precision: CopyPrecision, shapes: Shapes) -> dict[str, Form]:
    """Dtype and shape of every tensor of a copy, in the file's order."""
    found: dict[str, Form] = {}
    if precision == "nf4":
        found[MAP] = (torch.float32, (256,))
    for path, shape in shapes.items():
        found |= tensors_of(precision, path, shape)
    return found


def tensors_of(precision: CopyPrecision, path: str, shape: tuple[int, int]) -> dict[str, Form]:
    """The same for one matrix, its checksum last."""
    entries = shape[0] * shape[1]
    blocks = math.ceil(entries / NF4_BLOCK)
    held: dict[str, Form]
    if precision == "nf4":
        held = {
            f"{path}.weight": (torch.uint8, (math.ceil(entries / 2),)),
            f"{path}.weight.absmax": (torch.uint8, (blocks,)),
            f"{path}.weight.nested_absmax": (torch.float32, (math.ceil(blocks / ABSMAX_BLOCK),)),
            f"{path}.weight.nested_offset": (torch.float32, ()),
        }
    else:
        held = {f"{path}.weight": (torch.int8, shape), f"{path}.weight.absmax": (torch.float32, (shape[0],))}
    return {**held, path + CHECKSUM: (torch.uint8, (4,))}


def parts_of(weight: FrozenWeight) -> list[Tensor]:
    """What is stored of a weight, in the order of `tensors_of`."""
    if isinstance(weight, Int8Weight):
        return [weight.codes, weight.absmax]
    if isinstance(weight, Nf4Weight) and weight.nested is not None:
        scales, _, offset = weight.nested
        return [weight.packed, weight.absmax, scales, offset]
    raise TypeError(f"a {type(weight).__name__} is not stored")


def checksum(tensors: Sequence[Tensor]) -> bytes:
    """CRC-32 over the bytes of all of them in turn, low byte first."""
    code = 0
    for tensor in tensors:
        code = zlib.crc32(bytes_of(tensor), code)
    return code.to_bytes(4, "little")


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
