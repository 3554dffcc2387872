"""Adapters as PEFT keeps them: adapter_config.json beside adapter_model.safetensors.

What is written here loads in PEFT, and what PEFT wrote loads here. Nothing pickled is ever read. The format has no
specification; it is what `peft.PeftModel.save_pretrained` writes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from edgepeft.engine.methods import PEFT_PREFIX, AttachedAdapter, check_tensors, place
from edgepeft.engine.methods.lora import LoraUpdate
from edgepeft.engine.model.linear import AdaptedLinear
from edgepeft.engine.model.load import LoadedModel
from edgepeft.errors import BadInput, UsageError
from edgepeft.library.peft_config import check_supported
from edgepeft.methods import LoraConfig
from edgepeft.paths import write_atomic

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"


def save_adapter(folder: Path, adapter: AttachedAdapter, base_name: str) -> None:
    """Writes both files into `folder`, each whole or not at all; tensors are float32.

    Args:
        folder: made if it is not there.
        adapter: what to save.
        base_name: goes into the config as `base_model_name_or_path`.

    Raises:
        DiskProblem: no space, or no permission.
    """
    tensors = {PEFT_PREFIX + name: value.float().cpu().contiguous() for name, value in adapter.state_dict().items()}
    # The weights go first: a folder with a config is a folder that can be read.
    write_atomic(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
    write_atomic(folder / CONFIG_FILE, json.dumps(peft_config(adapter, base_name), indent=2, sort_keys=True) + "\n")


def peft_config(adapter: AttachedAdapter, base_name: str) -> dict[str, Any]:
    """The adapter's adapter_config.json."""
    config = adapter.config
    ranks = {module: update.A.shape[0] for module, update in adapter.updates.items()}
    alphas = {
        module: update.factor * (math.sqrt(ranks[module]) if config.rank_stabilised else ranks[module])
        for module, update in adapter.updates.items()
    }
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rank_stabilised,
        "target_modules": _target_modules(adapter),
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != config.rank},
        "alpha_pattern": {
            module: alpha for module, alpha in alphas.items() if not math.isclose(alpha, config.alpha, rel_tol=1e-9)
        },
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "use_dora": False,
    }


def read_adapter(folder: Path, loaded: LoadedModel, name: str) -> AttachedAdapter:
    """Reads an adapter, our own or PEFT's, and attaches it to `loaded` under `name`; it acts once it is set active.

    Raises:
        BadInput: a file is missing, damaged or pickled; the adapter is of a kind that is not supported; a tensor is
            missing, unknown to this model, misshaped or not finite. Nothing is attached then.
        UsageError: an adapter of this name is attached already.
    """
    settings = _read_config(folder / CONFIG_FILE)
    linears = loaded.linears()
    modules = _by_module(_read_tensors(folder), linears, str(folder / WEIGHTS_FILE))
    config = _lora_config(settings, modules, str(folder / CONFIG_FILE))
    _check_patterns(settings, str(folder / CONFIG_FILE))
    _check_targets(settings, modules, linears, folder)
    updates: dict[str, LoraUpdate] = {}
    for path in (path for path in linears if path in modules):
        tensors = modules[path]
        rank = int(_by_pattern(settings.get("rank_pattern"), path, config.rank))
        alpha = float(_by_pattern(settings.get("alpha_pattern"), path, config.alpha))
        out_features, in_features = linears[path].weight_source.shape
        expected = {f"{path}.lora_A.weight": (rank, in_features), f"{path}.lora_B.weight": (out_features, rank)}
        check_tensors(
            {f"{path}.{tensor}": value for tensor, value in tensors.items()},
            expected,
            where=str(folder / WEIGHTS_FILE),
        )
        A, B = (
            nn.Parameter(tensors[tensor].to(loaded.device, torch.float32, copy=True))
            for tensor in ("lora_A.weight", "lora_B.weight")
        )
        factor = alpha / (math.sqrt(rank) if config.rank_stabilised else rank)
        updates[path] = LoraUpdate(A, B, factor, path, config.dropout)
    return place(loaded, AttachedAdapter(name, config, updates))


def read_values(folder: Path, loaded: LoadedModel) -> dict[str, Tensor]:
    """The tensors of an adapter folder under the names of `AttachedAdapter.named_parameters`; nothing is attached.

    Raises:
        BadInput: the weights are missing or damaged, or a tensor fits no layer of this model.
    """
    modules = _by_module(_read_tensors(folder), loaded.linears(), str(folder / WEIGHTS_FILE))
    return {f"{path}.{name}": value for path, tensors in modules.items() for name, value in tensors.items()}


def _target_modules(adapter: AttachedAdapter) -> list[str]:
    """PEFT's `all-linear` reaches further than ours, so what it stands for is written out."""
    if "all-linear" not in adapter.config.targets:
        return sorted(adapter.config.targets)
    if any("language_model" in module for module in adapter.updates):
        # An ending would also match the vision tower's layers.
        return sorted(adapter.updates)
    return sorted({module.rsplit(".", 1)[-1] for module in adapter.updates})


def _read_config(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        hint = "Give the folder that holds adapter_config.json"
        raise BadInput("no adapter is here", where=str(path.parent), hint=hint) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInput("cannot be read as JSON", where=str(path), hint="Save the adapter anew") from error
    if not isinstance(settings, dict):
        raise BadInput("is no JSON object", where=str(path), hint="Save the adapter anew")
    check_supported(settings, str(path))
    return settings


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        if (folder / PICKLED_FILE).is_file():
            raise BadInput(
                f"only {PICKLED_FILE} is here, a pickle that could run any code",
                where=str(folder),
                hint=f"Load it in PEFT where you trust it and save it again as {WEIGHTS_FILE}",
            )
        raise BadInput(f"{WEIGHTS_FILE} is missing", where=str(folder), hint="Copy the whole adapter folder")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput("the file is damaged or cut short", where=str(path), hint="Copy it anew") from error
    if not tensors:
        raise BadInput("the file holds no tensors", where=str(path), hint="Save the adapter anew")
    return tensors


def _by_module(
    tensors: Mapping[str, Tensor], linears: Mapping[str, AdaptedLinear], where: str
) -> dict[str, dict[str, Tensor]]:
    """The file's tensors by the module of this model that they belong to, then by name."""
    # The language tower of a vision-language model lies under another prefix than the same model by itself.
    by_ending = {_from_layers(path): path for path in linears}
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.(lora_[AB])(?:\.default)?\.weight", key)
        module = match.group(1) if match else ""
        path = module if module in linears else by_ending.get(_from_layers(module))
        if match is None or path is None:
            hint = "The adapter belongs to another base model, or changes more than linear layers"
            raise BadInput(f"tensor {key} fits no layer of this model", where=where, hint=hint)
        found.setdefault(path, {})[f"{match.group(2)}.weight"] = value
    return found


def _from_layers(path: str) -> str:
    _, mark, rest = path.partition("layers.")
    return mark + rest if mark else path


def _lora_config(settings: Mapping[str, Any], modules: Iterable[str], where: str) -> LoraConfig:
    targets = settings.get("target_modules")
    named = isinstance(targets, list) and bool(targets) and not _restricted(settings)
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
        )
    except UsageError as error:
        raise BadInput(error.what, where=where, hint=error.hint) from error


def _check_targets(
    settings: Mapping[str, Any], modules: Mapping[str, Any], linears: Iterable[str], folder: Path
) -> None:
    """Every layer that the config targets must be in the file."""
    targets = settings.get("target_modules")
    if not isinstance(targets, list) or _restricted(settings):
        return
    for path in linears:
        if path not in modules and any(path == target or path.endswith(f".{target}") for target in targets):
            raise BadInput(
                f"tensor {path}.lora_A.weight is missing, though {CONFIG_FILE} targets it",
                where=str(folder / WEIGHTS_FILE),
                hint="It belongs to another base model or was damaged",
            )


def _restricted(settings: Mapping[str, Any]) -> bool:
    """Whether target_modules alone does not say which layers are changed."""
    return any(settings.get(key) is not None for key in ("layers_to_transform", "layers_pattern", "exclude_modules"))


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, default: float) -> float:
    """The value of the first pattern that ends `path`, as PEFT matches them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return float(value)
    return default


def _check_patterns(settings: Mapping[str, Any], where: str) -> None:
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(key) or {}
        try:
            sound = isinstance(patterns, dict) and all(
                isinstance(value, int | float) and value > 0 and re.compile(pattern)
                for pattern, value in patterns.items()
            )
        except re.error:
            sound = False
        if not sound:
            raise BadInput(
                f"{key} must give a number above 0 for each module pattern", where=where, hint="Save the adapter anew"
            )
