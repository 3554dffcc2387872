"""What tests of stored quantized bases share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgepeft.engine.model import load as loading
from edgepeft.engine.model.frozen import DenseWeight, Int8Weight, Nf4Weight
from edgepeft.engine.model.load import LoadedModel, load_model
from edgepeft.models.store import ModelEntry

CPU = torch.device("cpu")
IDS = torch.randint(0, 250, (2, 13), generator=torch.Generator().manual_seed(5))


def load(entry: ModelEntry, precision: Any = "nf4", **options: Any) -> LoadedModel:
    return load_model(entry, **{"precision": precision, "compute_dtype": "bf16", "device": CPU, **options})


def told_by(entry: ModelEntry, precision: Any = "nf4") -> list[str]:
    """What a load warns of."""
    words: list[str] = []
    load(entry, precision, warn=words.append)
    return words


def copy_file(entry: ModelEntry, precision: str = "nf4") -> Path:
    return Path(entry.folder) / "quantized" / precision / "cpu.safetensors"


def forget(entry: ModelEntry) -> None:
    shutil.rmtree(Path(entry.folder) / "quantized")


def files_of(entry: ModelEntry) -> list[Path]:
    return [path for path in (Path(entry.folder) / "quantized").rglob("*") if path.is_file()]


def held(loaded: LoadedModel) -> dict[str, list[Tensor]]:
    """Every tensor of every linear."""
    found: dict[str, list[Tensor]] = {}
    for path, linear in loaded.linears().items():
        weight = linear.weight_source
        if isinstance(weight, Nf4Weight):
            found[path] = [weight.packed, weight.absmax, *(weight.nested or ())]
        elif isinstance(weight, Int8Weight):
            found[path] = [weight.codes, weight.absmax]
        else:
            assert isinstance(weight, DenseWeight)
            found[path] = [weight.values]
    return found


def logits(loaded: LoadedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = loaded.model(IDS).logits
    return found


def assert_same(one: LoadedModel, other: LoadedModel) -> None:
    mine, others = held(one), held(other)
    assert list(mine) == list(others)
    for path, tensors in mine.items():
        for tensor, expected in zip(tensors, others[path], strict=True):
            assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
            assert torch.equal(tensor, expected), path
    assert torch.equal(logits(one), logits(other))


def forbid_quantizing(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, a load that quantizes fails."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError("quantized again")

    monkeypatch.setattr(loading, "freeze", refuse)
