"""LoRA as PEFT keeps it: what adapter_config.json says, and the pairs of A and B in the file.

The format has no specification; it is what `peft.PeftModel.save_pretrained` writes. Beside the update of an embedding
or a head PEFT also writes the base's own table; that is read to see that the adapter belongs to this base, and not
written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from edgepeft.engine.methods.adapter import AttachedAdapter, check_tensors
from edgepeft.engine.model.load import LoadedModel
from edgepeft.engine.model.tables import AdaptedTable
from edgepeft.errors import BadInput, UsageError
from edgepeft.library.peft_config import check_patterns, is_restricted, value_by_pattern
from edgepeft.library.store import CONFIG_FILE, WEIGHTS_FILE
from edgepeft.library.tensors import from_layers, in_other_tower
from edgepeft.methods.lora import LoraConfig
from edgepeft.methods.targets import means, table_of

MAGNITUDE = "lora_magnitude_vector"
"""DoRA's lengths of rows, as PEFT's files name them."""
BASE_TABLE = "base_layer.weight"
"""The base's own embedding or head in PEFT's file."""
_KEY = re.compile(
    r"(?:base_model\.model\.)?(.+)\."
    r"(lora_[AB](?=.*\.weight$)|lora_magnitude_vector|lora_embedding_[AB]|base_layer(?=\.weight$))"
    r"(?:\.default)?(?:\.weight)?"
)
_COMPARED_ROWS = 4096
_ROUNDING = 1e-2
"""By how much a table may differ that was held in another dtype."""
_NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "base_layer": BASE_TABLE}


class LoraModule(NamedTuple):
    """The update of one linear, or of the embedding, as a file has it."""

    A: Tensor
    """[rank, in]; [rank, vocabulary] of the embedding."""
    B: Tensor
    """[out, rank]; [hidden, rank] of the embedding."""
    factor: float
    """What their product is multiplied with."""
    magnitude: Tensor | None = None
    """DoRA's lengths, [out]."""
    of_embedding: bool = False


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
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], loaded: LoadedModel, folder: Path
) -> tuple[LoraConfig, dict[str, LoraModule]]:
    """The config, and A and B by the module of this model, in its order.

    Raises:
        BadInput: a setting cannot be meant; a tensor is missing, unknown to this model, misshaped or not finite; a
            table beside the updates is not this base's.
    """
    where = str(folder / WEIGHTS_FILE)
    linears, tables = loaded.linears(), loaded.tables()
    paths = [*(path for path, table in tables.items() if table.reads_ids), *linears]
    paths += [path for path, table in tables.items() if not table.reads_ids]
    modules = _by_module(tensors, paths, where)
    _check_base_tables(modules, tables, where)
    config = _lora_config(settings, modules, str(folder / CONFIG_FILE))
    check_patterns(settings, str(folder / CONFIG_FILE))
    _check_targets(settings, modules, paths, folder)
    if settings.get("ensure_weight_tying") and loaded.is_tied and any(path in modules for path in tables):
        raise BadInput(
            "the adapter changes embedding and head as one (ensure_weight_tying), which cannot be loaded",
            where=str(folder / CONFIG_FILE),
            hint="Merge it into its base in PEFT, or train it without",
        )
    found: dict[str, LoraModule] = {}
    for path in (path for path in paths if path in modules):
        rank = int(value_by_pattern(settings.get("rank_pattern"), path, config.rank))
        alpha = float(value_by_pattern(settings.get("alpha_pattern"), path, config.alpha))
        embeds = path in tables and tables[path].reads_ids
        of_a, of_b = ("lora_embedding_A", "lora_embedding_B") if embeds else ("lora_A.weight", "lora_B.weight")
        out_features, in_features = tables[path].own.shape if path in tables else linears[path].weight_source.shape
        if embeds:
            out_features, in_features = in_features, out_features
        expected: dict[str, tuple[int, ...]] = {
            f"{path}.{of_a}": (rank, in_features),
            f"{path}.{of_b}": (out_features, rank),
        }
        if config.dora:
            expected[f"{path}.{MAGNITUDE}"] = (out_features,)
        named = {f"{path}.{tensor}": value for tensor, value in modules[path].items()}
        check_tensors(named, expected, where=where)
        factor = alpha / (math.sqrt(rank) if config.rank_stabilised else rank)
        A, B = modules[path][of_a], modules[path][of_b]
        found[path] = LoraModule(A, B, factor, modules[path].get(MAGNITUDE), embeds)
    ranks = {path: int(module.A.shape[0]) for path, module in found.items() if module.A.shape[0] != config.rank}
    return msgspec.structs.replace(config, ranks=ranks), found


def target_modules(adapter: AttachedAdapter) -> list[str]:
    """PEFT's `all-linear` reaches further than ours, so what it stands for is written out; embedding and head are
    called as this model calls them."""
    config: Any = adapter.config
    if "all-linear" not in config.targets:
        tables = [path.rsplit(".", 1)[-1] for path in adapter.updates if table_of(path) is not None]
        return sorted({*(name for name in config.targets if table_of(name) is None), *tables})
    if any("language_model" in module for module in adapter.updates):
        # An ending would also match the vision tower's layers.
        return sorted(adapter.updates)
    return sorted({module.rsplit(".", 1)[-1] for module in adapter.updates})


def _by_module(tensors: Mapping[str, Tensor], paths: Sequence[str], where: str) -> dict[str, dict[str, Tensor]]:
    """The file's tensors by the module of this model that they belong to, then by name."""
    # The language tower of a vision-language model lies under another prefix than the same model by itself.
    by_ending = {_ending(path): path for path in paths}
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        module = match.group(1) if match else ""
        path = module if module in paths else by_ending.get(_ending(module))
        if match is None or path is None:
            hint = "The adapter belongs to another base model, or changes more than linear layers and tables"
            raise BadInput(f"tensor {key} fits no layer of this model", where=where, hint=hint)
        if in_other_tower(module):
            raise BadInput(f"tensor {key} changes another part than the language model", where=where)
        tensor = _NAMES.get(match.group(2), match.group(2))
        named = found.setdefault(path, {})
        if tensor in named:
            raise BadInput(f"{path} has two tensors {tensor}", where=where, hint="Save the adapter anew")
        named[tensor] = value
    return found


def _ending(path: str) -> str:
    return path.rsplit(".", 1)[-1] if table_of(path) is not None else from_layers(path)


def _check_base_tables(
    modules: Mapping[str, dict[str, Tensor]], tables: Mapping[str, AdaptedTable], where: str
) -> None:
    """Takes out the tables of the base that PEFT writes as well, and refuses those of another base."""
    for path, named in modules.items():
        theirs = named.pop(BASE_TABLE, None)
        if theirs is None:
            continue
        if path not in tables:
            raise BadInput(f"tensor {path}.{BASE_TABLE} fits no layer of this model", where=where)
        own = tables[path].own
        hint = "Save the model that it was trained on, its embedding and head included, and add that as its base"
        if theirs.shape != own.shape:
            raise BadInput(
                f"the adapter was trained with {theirs.shape[0]} rows in {path}, and this base has {own.shape[0]}",
                where=where,
                hint=hint,
            )
        # One that only reads adapters has no values.
        if not own.is_meta and not _equal_by_parts(theirs, own):
            raise BadInput(
                f"the adapter was trained with other values in {path} than this base has", where=where, hint=hint
            )


def _equal_by_parts(theirs: Tensor, own: Tensor) -> bool:
    """Whether two tables are the same to rounding; some rows at a time, as comparing takes several copies."""
    return all(
        torch.allclose(part.to(own.device, own.dtype), rows, rtol=_ROUNDING, atol=_ROUNDING)
        for part, rows in zip(theirs.split(_COMPARED_ROWS), own.split(_COMPARED_ROWS), strict=True)
    )


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


def _check_targets(settings: Mapping[str, Any], modules: Mapping[str, Any], paths: Iterable[str], folder: Path) -> None:
    """Every layer that the config targets must be in the file."""
    targets = settings.get("target_modules")
    if not isinstance(targets, list) or is_restricted(settings):
        return
    for path in paths:
        if path not in modules and any(means(target, path) for target in targets):
            raise BadInput(
                f"tensor {path}.lora_A.weight is missing, though {CONFIG_FILE} targets it",
                where=str(folder / WEIGHTS_FILE),
                hint="It belongs to another base model or was damaged",
            )
