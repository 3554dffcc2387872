"""Tensors into one safetensors file, with the errors of a disk as a person needs them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from edgepeft.errors import DiskProblem


def save_tensors(path: Path, tensors: Mapping[str, Tensor], *, hint: str) -> None:
    """Writes tensors on the CPU, each contiguous, with the metadata that PEFT and transformers ask for.

    Args:
        path: of the file; written in place.
        tensors: by name.
        hint: what to do where that fails.

    Raises:
        DiskProblem: no space, or no permission.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise DiskProblem(f"cannot be written: {error}", where=str(path), hint=hint) from error
