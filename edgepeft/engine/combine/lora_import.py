"""A LoRA file of another program as PEFT's tensors: each pair found, turned, checked and named anew."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from edgepeft.engine.combine.gguf_adapter import GgufLora
from edgepeft.engine.combine.lora_names import NamedPair, pair_names
from edgepeft.engine.combine.outline import open_outline, shapes_of
from edgepeft.engine.saving import save_tensors
from edgepeft.engine.simulate.model import read_config
from edgepeft.engine.training.device import package_versions
from edgepeft.errors import BadInput
from edgepeft.library.lora_file import Imported, ImportRequest
from edgepeft.library.peft_config import PEFT_PREFIX
from edgepeft.library.tensors import from_layers, in_other_tower
from edgepeft.models.source_folder import read_json
from edgepeft.models.store import find_model
from edgepeft.processes import Progress

_ALPHA_KEYS = ("lora_alpha", "alpha", "ss_network_alpha")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class ReadPair(NamedTuple):
    """The update of one linear, as a file has it."""

    path: str
    """Of the linear in the base."""
    A: Tensor
    """[rank, in]."""
    B: Tensor
    """[out, rank]."""
    alpha: float | None
    """As the file says it; None where it does not."""


def import_lora(request: ImportRequest, report: Progress) -> Imported:
    """Writes the weights file, float32 under PEFT's names.

    Raises:
        BadInput: the file is damaged or is no LoRA; a tensor fits no linear of the base, is misshaped or not finite; or
            nothing tells alpha.
        DiskProblem: no space, or no permission.
    """
    report("reading", None)
    entry = find_model(request.base)
    shapes = shapes_of(open_outline(entry))
    where = request.file.path
    pairs: Iterator[ReadPair]
    if request.file.format == "gguf":
        config = read_config(read_json(Path(entry.folder) / "config.json"))
        lora = GgufLora(Path(where), config, shapes, entry.name)
        pairs = (ReadPair(path, A, B, lora.alpha(A)) for path, A, B in lora.pairs())
    else:
        pairs = _read_safetensors(where, shapes, entry.name)
    said = "the file"
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    file_alphas: set[float] = set()
    for path, A, B, own in pairs:
        _check_pair(path, A, B, shapes[path], where, entry.name)
        rank = int(A.shape[0])
        own = request.file.scale * rank if request.file.scale is not None else own
        file_alphas |= {own} if own is not None else set()
        ranks[path], alphas[path] = rank, _alpha(request.alpha if request.alpha is not None else own, path, where)
        tensors[f"{PEFT_PREFIX}{path}.lora_A.weight"] = A.float().contiguous()
        tensors[f"{PEFT_PREFIX}{path}.lora_B.weight"] = B.float().contiguous()
    report("writing", None)
    save_tensors(Path(request.weights_file), tensors, hint="Free some space, or set EDGEPEFT_HOME to another disk")
    notes: tuple[str, ...] = ()
    if request.alpha is not None and file_alphas - {request.alpha}:
        told = ", ".join(f"{alpha:g}" for alpha in sorted(file_alphas))
        notes = (f"the file says alpha {told}; --alpha {request.alpha:g} was taken instead",)
    if request.file.scale is not None:
        said = f"mlx-lm's config beside it, scale {request.file.scale:g} times the rank"
    return Imported(
        ranks=ranks,
        alphas=alphas,
        targets=_targets(ranks, shapes),
        alpha_from=said if request.alpha is None else "--alpha",
        versions=package_versions(),
        notes=notes,
    )


def _read_safetensors(where: str, shapes: Mapping[str, tuple[int, int]], base: str) -> Iterator[ReadPair]:
    """The pairs of a file, in the order of the base's linears."""
    try:
        with safe_open(where, framework="pt") as file:
            named: dict[str, NamedPair] = {}
            for own_path, pair in pair_names(file.keys(), where).items():
                path = _in_base(own_path, shapes, pair, where, base)
                if path in named:
                    raise BadInput(f"changes {path} twice", where=where, hint=_ANEW)
                named[path] = pair
            alpha = _metadata_alpha(file.metadata() or {})
            for path in (path for path in shapes if path in named):
                pair = named[path]
                A, B = (_matrix(file, key, where) for key in (pair.a_key, pair.b_key))
                own = alpha if pair.alpha_key is None else _number(file, pair.alpha_key, where)
                yield ReadPair(path, A.T if pair.transposed else A, B.T if pair.transposed else B, own)
    except (SafetensorError, OSError) as error:
        raise BadInput("is damaged or cut short", where=where, hint="Copy it anew") from error


def _in_base(path: str, shapes: Mapping[str, tuple[int, int]], pair: NamedPair, where: str, base: str) -> str:
    """The path of a linear in the base; the language tower of a larger model lies under another prefix."""
    if path in shapes:
        return path
    others = [known for known in shapes if from_layers(known) == from_layers(path)]
    if len(others) != 1 or in_other_tower(path):
        names = ", ".join(sorted({known.rsplit(".", 1)[-1] for known in shapes}))
        raise BadInput(
            f"tensor {pair.a_key} fits no linear of {base}'s layers",
            where=where,
            hint=f"It belongs to another base, or changes more than these: {names}",
        )
    return others[0]


def _matrix(file: Any, key: str, where: str) -> Tensor:
    value: Tensor = file.get_tensor(key)
    if value.dtype not in _FLOATS or value.dim() != 2:
        told = "×".join(map(str, value.shape)) or "a single number"
        raise BadInput(
            f"tensor {key} is {told} of {str(value.dtype).removeprefix('torch.')}, not a matrix of floats", where=where
        )
    return value


def _number(file: Any, key: str, where: str) -> float:
    value: Tensor = file.get_tensor(key)
    if value.numel() != 1:
        raise BadInput(f"tensor {key} has {value.numel()} entries, not one", where=where, hint=_ANEW)
    return float(value.reshape(()))


def _metadata_alpha(metadata: Mapping[str, str]) -> float | None:
    for key in _ALPHA_KEYS:
        try:
            return float(metadata[key])
        except (KeyError, ValueError, TypeError):
            continue
    return None


def _alpha(value: float | None, path: str, where: str) -> float:
    if value is None:
        raise BadInput(
            f"does not say the alpha of {path}, by which its updates are scaled (alpha / rank)",
            where=where,
            hint="Add --alpha with what it was trained with",
        )
    if not (math.isfinite(value) and value > 0):
        raise BadInput(
            f"says alpha {value:g} for {path}, which is no number above 0",
            where=where,
            hint="Add --alpha with what it was trained with",
        )
    return value


def _check_pair(path: str, A: Tensor, B: Tensor, shape: tuple[int, int], where: str, base: str) -> None:
    """Whether A [rank, in] and B [out, rank] are the halves of one update of a linear [out, in]."""
    out_features, in_features = shape
    if A.shape[1] != in_features or B.shape[0] != out_features:
        raise BadInput(
            f"its update of {path} maps {A.shape[1]} to {B.shape[0]} features, {base}'s linear maps {in_features} to "
            f"{out_features}",
            where=where,
            hint="It belongs to another base",
        )
    if A.shape[0] != B.shape[1] or A.shape[0] == 0:
        raise BadInput(
            f"its A of {path} has rank {A.shape[0]} and its B rank {B.shape[1]}: they are no pair",
            where=where,
            hint=_ANEW,
        )
    if not all(bool(torch.isfinite(matrix.float()).all()) for matrix in (A, B)):
        raise BadInput(f"its update of {path} holds values that are not finite numbers", where=where, hint=_ANEW)


def _targets(paths: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Last names where they mean just these linears, else their paths."""
    names = {path.rsplit(".", 1)[-1] for path in paths}
    meant = {path for path in shapes if path.rsplit(".", 1)[-1] in names}
    # In a larger model a last name would also reach into the other towers.
    if meant == set(paths) and not any("language_model" in path for path in paths):
        return sorted(names)
    return sorted(paths)


_ANEW = "It was damaged, or another program wrote it: save it anew where it was made"
