"""LoRA as PEFT keeps it: what adapter_config.json says, and the pairs of A and B in the file.

The format has no specification; it is what `peft.PeftModel.save_pretrained` writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from torch import Tensor

from edgepeft.engine.methods.adapter import AttachedAdapter, check_tensors
from edgepeft.engine.model.linear import AdaptedLinear
from edgepeft.errors import BadInput, UsageError
from edgepeft.library.peft_config import check_patterns, is_restricted, value_by_pattern
from edgepeft.library.store import CONFIG_FILE, WEIGHTS_FILE
from edgepeft.library.tensors import from_layers
from edgepeft.methods.lora import LoraConfig
from edgepeft.methods.targets import means

MAGNITUDE = "lora_magnitude_vector"
"""DoRA's lengths of rows, as PEFT's files name them."""
_KEY = re.compile(
    r"(?:base_model\.model\.)?(.+)\.(lora_[AB](?=.*\.weight$)|lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
)


class LoraModule(NamedTuple):
    """The update of one linear, as a file has it."""

    A: Tensor
    """[rank, in]."""
    B: Tensor
    """[out, rank]."""
    factor: float
    """What their product is multiplied with."""
    magnitude: Tensor | None = None
    """DoRA's lengths, [out]."""


def settings_of(adapter: AttachedAdapter) -> dict[str, Any]:
    """The adapter's adapter_config.json, as far as it concerns the method."""
    config: Any = adapter.config
    updates: Mapping[str, Any] = adapter.updates
    ranks = {module: update.A.shape[0] for module, update in updates.items()}
    alphas = {
        module: update.factor * (math.sqrt(ranks[module]) if config.rank_stabilised else ranks[module])
        for module, update in updates.items()
    }
    return {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rank_stabilised,
        "target_modules": target_modules(adapter),
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != config.rank},
        "alpha_pattern": {
            module: alpha for module, alpha in alphas.items() if not math.isclose(alpha, config.alpha, rel_tol=1e-9)
        },
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "use_dora": config.dora,
    }


def read_modules(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], linears: Mapping[str, AdaptedLinear], folder: Path
) -> tuple[LoraConfig, dict[str, LoraModule]]:
    """The config, and A and B by the module of this model, in its order.

    Raises:
        BadInput: a setting cannot be meant; a tensor is missing, unknown to this model, misshaped or not finite.
    """
    modules = _by_module(tensors, linears, str(folder / WEIGHTS_FILE))
    config = _lora_config(settings, modules, str(folder / CONFIG_FILE))
    check_patterns(settings, str(folder / CONFIG_FILE))
    _check_targets(settings, modules, linears, folder)
    found: dict[str, LoraModule] = {}
    for path in (path for path in linears if path in modules):
        rank = int(value_by_pattern(settings.get("rank_pattern"), path, config.rank))
        alpha = float(value_by_pattern(settings.get("alpha_pattern"), path, config.alpha))
        out_features, in_features = linears[path].weight_source.shape
        expected: dict[str, tuple[int, ...]] = {
            f"{path}.lora_A.weight": (rank, in_features),
            f"{path}.lora_B.weight": (out_features, rank),
        }
        if config.dora:
            expected[f"{path}.{MAGNITUDE}"] = (out_features,)
        named = {f"{path}.{tensor}": value for tensor, value in modules[path].items()}
        check_tensors(named, expected, where=str(folder / WEIGHTS_FILE))
        factor = alpha / (math.sqrt(rank) if config.rank_stabilised else rank)
        A, B = modules[path]["lora_A.weight"], modules[path]["lora_B.weight"]
        found[path] = LoraModule(A, B, factor, modules[path].get(MAGNITUDE))
    ranks = {path: int(module.A.shape[0]) for path, module in found.items() if module.A.shape[0] != config.rank}
    return msgspec.structs.replace(config, ranks=ranks), found


def target_modules(adapter: AttachedAdapter) -> list[str]:
    """PEFT's `all-linear` reaches further than ours, so what it stands for is written out."""
    config: Any = adapter.config
    if "all-linear" not in config.targets:
        return sorted(config.targets)
    if any("language_model" in module for module in adapter.updates):
        # An ending would also match the vision tower's layers.
        return sorted(adapter.updates)
    return sorted({module.rsplit(".", 1)[-1] for module in adapter.updates})


def _by_module(
    tensors: Mapping[str, Tensor], linears: Mapping[str, AdaptedLinear], where: str
) -> dict[str, dict[str, Tensor]]:
    """The file's tensors by the module of this model that they belong to, then by name."""
    # The language tower of a vision-language model lies under another prefix than the same model by itself.
    by_ending = {from_layers(path): path for path in linears}
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        module = match.group(1) if match else ""
        path = module if module in linears else by_ending.get(from_layers(module))
        if match is None or path is None:
            hint = "The adapter belongs to another base model, or changes more than linear layers"
            raise BadInput(f"tensor {key} fits no layer of this model", where=where, hint=hint)
        tensor = match.group(2)
        found.setdefault(path, {})[tensor if tensor == MAGNITUDE else f"{tensor}.weight"] = value
    return found


def _lora_config(settings: Mapping[str, Any], modules: Iterable[str], where: str) -> LoraConfig:
    targets = settings.get("target_modules")
    named = isinstance(targets, list) and bool(targets) and not is_restricted(settings)
    rank, alpha, dropout = settings.get("r"), settings.get("lora_alpha"), settings.get("lora_dropout") or 0.0
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or not isinstance(dropout, int | float):
        raise BadInput("r and lora_alpha must be numbers", where=where, hint="Save the adapter anew")
    try:
        return LoraConfig(
            rank=rank,
            alpha=float(alpha),
            targets=tuple(sorted(map(str, targets))) if named and isinstance(targets, list) else tuple(modules),
            dropout=float(dropout),
            rank_stabilised=bool(settings.get("use_rslora")),
            dora=bool(settings.get("use_dora")),
        )
    except UsageError as error:
        raise BadInput(error.what, where=where, hint=error.hint) from error


def _check_targets(
    settings: Mapping[str, Any], modules: Mapping[str, Any], linears: Iterable[str], folder: Path
) -> None:
    """Every layer that the config targets must be in the file."""
    targets = settings.get("target_modules")
    if not isinstance(targets, list) or is_restricted(settings):
        return
    for path in linears:
        if path not in modules and any(means(target, path) for target in targets):
            raise BadInput(
                f"tensor {path}.lora_A.weight is missing, though {CONFIG_FILE} targets it",
                where=str(folder / WEIGHTS_FILE),
                hint="It belongs to another base model or was damaged",
            )
