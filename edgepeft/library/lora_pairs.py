"""What a LoRA adapter changes, read from its config and the header of its weights: no tensor, no torch, no base."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from edgepeft.errors import BadInput
from edgepeft.library.peft_config import PEFT_PREFIX, check_patterns, check_supported, value_by_pattern
from edgepeft.library.store import CONFIG_FILE, AdapterFolder
from edgepeft.library.tensors import from_layers
from edgepeft.models.headers import TensorHeader, read_header

_KEY = re.compile(rf"(?:{re.escape(PEFT_PREFIX)})?(?P<path>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_FLOATS = ("F16", "BF16", "F32", "F64")
_ANEW = "It was damaged, or another program wrote it: save it anew where it was made"


class LoraPair(msgspec.Struct, frozen=True):
    """The update of one linear: `scale` · B · A."""

    a_key: str
    """Key of A, of shape [rank, in_features], in the weights file."""
    b_key: str
    """Key of B, of shape [out_features, rank]."""
    rank: int
    in_features: int
    out_features: int
    scale: float
    """alpha / rank, or alpha / √rank with rank-stabilised scaling; patterns are taken into account."""


def read_lora_pairs(adapter: AdapterFolder) -> dict[str, LoraPair]:
    """Module path → pair, in the order of the paths.

    Raises:
        BadInput: the adapter is no plain LoRA; its config cannot be meant; a tensor is missing, misshaped, or belongs
            to no pair.
    """
    where, settings = str(adapter.path / CONFIG_FILE), adapter.config
    kind = settings.get("peft_type")
    if kind != "LORA" or settings.get("use_dora"):
        raise BadInput(
            f"is of the type {'DoRA' if kind == 'LORA' else kind}, and only LoRA's products B·A can be combined",
            where=adapter.reference,
            hint="Use LoRA adapters",
        )
    check_supported(settings, where)
    check_patterns(settings, where)
    rank = settings.get("r")
    if not _is_number(settings.get("lora_alpha")) or not isinstance(rank, int) or rank < 1:
        raise BadInput("r and lora_alpha must be numbers, and r a whole one above 0", where=where, hint=_ANEW)
    sides = _sides(read_header(adapter.weights), adapter)
    return {path: _pair(path, sides[path], settings, adapter) for path in sorted(sides, key=_in_order)}


def join_paths(modules: Sequence[Iterable[str]]) -> list[dict[str, str]]:
    """For several adapters of one base: module path in each → path under which all of them are joined.

    The language tower of a vision-language model lies under another prefix than the same model by itself, so a path
    that another adapter does not have is the same module when it agrees from `layers.` on.
    """
    seen: dict[str, str] = {}
    joined: list[dict[str, str]] = []
    for paths in modules:
        own = list(paths)
        endings = [from_layers(path) for path in own]
        names: dict[str, str] = {}
        for path, ending in zip(own, endings, strict=True):
            other = seen.get(ending)
            # Two towers with the same ending in one adapter, or both spellings: the path itself decides.
            names[path] = other if other and other not in own and endings.count(ending) == 1 else path
        joined.append(names)
        for path, ending in zip(own, endings, strict=True):
            seen.setdefault(ending, names[path])
    return joined


def _sides(tensors: Iterable[TensorHeader], adapter: AdapterFolder) -> dict[str, dict[str, TensorHeader]]:
    """Module path → `A` and `B` → tensor."""
    found: dict[str, dict[str, TensorHeader]] = {}
    for tensor in tensors:
        match = _KEY.fullmatch(tensor.name)
        if match is None:
            raise BadInput(
                f"tensor {tensor.name} belongs to no LoRA beside a linear layer, so it cannot be combined",
                where=str(adapter.weights),
                hint="Train the adapter without it",
            )
        sides = found.setdefault(match["path"], {})
        if match["side"] in sides:
            raise BadInput(
                f"{match['path']} has two tensors lora_{match['side']}", where=str(adapter.weights), hint=_ANEW
            )
        if tensor.dtype not in _FLOATS:
            raise BadInput(f"tensor {tensor.name} is of {tensor.dtype}, not of floats", where=str(adapter.weights))
        sides[match["side"]] = tensor
    if not found:
        raise BadInput("holds no tensors", where=str(adapter.weights), hint=_ANEW)
    return found


def _pair(
    path: str, sides: Mapping[str, TensorHeader], settings: Mapping[str, Any], adapter: AdapterFolder
) -> LoraPair:
    for side in "AB":
        if side not in sides:
            raise BadInput(f"tensor {path}.lora_{side}.weight is missing", where=str(adapter.weights), hint=_ANEW)
    a, b = sides["A"], sides["B"]
    rank = int(value_by_pattern(settings.get("rank_pattern"), path, settings["r"]))
    alpha = value_by_pattern(settings.get("alpha_pattern"), path, settings["lora_alpha"])
    for tensor, shape in ((a, (rank, *a.shape[1:])), (b, (*b.shape[:1], rank))):
        if len(tensor.shape) != 2 or tensor.shape != shape or 0 in shape:
            told = "×".join(map(str, tensor.shape)) or "a single number"
            raise BadInput(
                f"tensor {tensor.name} is {told}, and {CONFIG_FILE} says rank {rank}",
                where=str(adapter.weights),
                hint=_ANEW,
            )
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return LoraPair(a.name, b.name, rank, a.shape[1], b.shape[0], scale)


def _in_order(path: str) -> list[tuple[int, str]]:
    """Layers by their number."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
