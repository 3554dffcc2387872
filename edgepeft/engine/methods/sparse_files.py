"""Sparse adapters on disk: in the form of PEFT's SHiRA where they have as many entries as it counts, else in our own.

SHiRA keeps `shira_weight`, float32 [entries], and `shira_indices`, int32 [2, entries] of rows and columns. Our own form
(`own_files`) keeps `sparse_values` and `sparse_places`, int32 [entries].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from edgepeft.engine.methods import own_files
from edgepeft.engine.methods.adapter import AttachedAdapter, Parts
from edgepeft.engine.methods.lora_files import target_modules
from edgepeft.errors import BadInput, EdgepeftError
from edgepeft.library.peft_config import OWN_KEY, PEFT_PREFIX
from edgepeft.library.store import CONFIG_FILE, WEIGHTS_FILE
from edgepeft.methods.sparse import SparseConfig

VALUES, PLACES = "sparse_values", "sparse_places"
_SHIRA_VALUES, _SHIRA_PLACES = "shira_weight", "shira_indices"


def settings_of(adapter: AttachedAdapter) -> dict[str, Any]:
    """See `EngineMethod`."""
    config: Any = adapter.config
    if not config.rank:
        return own_files.settings_of(adapter)
    return {
        "peft_type": "SHIRA",
        "r": config.rank,
        "mask_type": "random",
        "target_modules": target_modules(adapter),
        "fan_in_fan_out": False,
        "init_weights": True,
        "modules_to_save": None,
    }


def written(config: SparseConfig, updates: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the file by key; see `Parts.written`."""
    found = {}
    for path, update in updates.items():
        values, places, columns = update.values.detach(), update.places, update.shape[1]
        if config.rank:
            found[f"{PEFT_PREFIX}{path}.{_SHIRA_VALUES}"] = values
            found[f"{PEFT_PREFIX}{path}.{_SHIRA_PLACES}"] = torch.stack([places // columns, places % columns])
        else:
            found[f"{PEFT_PREFIX}{path}.{VALUES}"] = values
            found[f"{PEFT_PREFIX}{path}.{PLACES}"] = places
    return found


def read_parts(
    make: Callable[[SparseConfig], Parts], settings: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> tuple[SparseConfig, Parts]:
    """An adapter from its file; see `EngineMethod.restore`.

    Args:
        make: the parts of a config, for places that are not known yet.
        settings: adapter_config.json.
        tensors: of the file.
        folder: where it was read.
    """
    where = str(folder / CONFIG_FILE)
    try:
        config = _config(settings)
        parts = make(config)
    except (msgspec.ValidationError, EdgepeftError) as error:
        what = error.what if isinstance(error, EdgepeftError) else str(error)
        raise BadInput(what, where=where, hint="It belongs to another base, or is damaged") from error
    updates: Mapping[str, Any] = parts.updates
    columns = {path: update.shape[1] for path, update in updates.items()}
    if settings.get("peft_type") == "SHIRA":
        tensors = _as_own(tensors, columns, str(folder / WEIGHTS_FILE))
    own_files.load_values(AttachedAdapter("", config, parts), tensors, folder)
    for path, update in updates.items():
        _check_places(f"{path}.{PLACES}", update.places, update.shape, str(folder / WEIGHTS_FILE))
    return config, parts


def _config(settings: Mapping[str, Any]) -> SparseConfig:
    if settings.get("peft_type") != "SHIRA":
        return msgspec.convert(settings.get(OWN_KEY), SparseConfig)
    rank, named = settings.get("r"), settings.get("target_modules")
    if not isinstance(rank, int) or rank < 1:
        raise BadInput("r must be a whole number above 0")
    if not isinstance(named, list) or not named:
        raise BadInput("target_modules must be a list")
    return SparseConfig(rank=rank, choose="random", targets=tuple(sorted(map(str, named))))


def _as_own(tensors: Mapping[str, Tensor], columns: Mapping[str, int], where: str) -> dict[str, Tensor]:
    """SHiRA's tensors in our own form: places in ascending order, and the values with them."""
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        path, _, name = key.removeprefix(PEFT_PREFIX).rpartition(".")
        if name == _SHIRA_VALUES:
            found[f"{path}.{VALUES}"] = value
        elif name == _SHIRA_PLACES and path in columns and value.dim() == 2 and value.shape[0] == 2:
            rows, column = value.to(torch.int64)
            if bool(((column < 0) | (column >= columns[path])).any()):
                raise _no_places(key, where)
            found[f"{path}.{PLACES}"] = rows * columns[path] + column
        else:
            found[key.removeprefix(PEFT_PREFIX)] = value
    for key, places in [item for item in found.items() if item[0].endswith(PLACES)]:
        values = found.get(key.replace(PLACES, VALUES))
        if values is not None and values.shape == places.shape:
            found[key], order = places.sort()
            found[key.replace(PLACES, VALUES)] = values[order]
    return found


def _check_places(key: str, places: Tensor, shape: tuple[int, int], where: str) -> None:
    inside = bool((places[:1] >= 0).all()) and bool((places[-1:] < shape[0] * shape[1]).all())
    if not inside or not bool((places[1:] > places[:-1]).all()):
        raise _no_places(key, where)


def _no_places(key: str, where: str) -> BadInput:
    return BadInput(
        f"tensor {key} names places outside of the matrix, or one twice",
        where=where,
        hint="It belongs to another base model or was damaged",
    )
