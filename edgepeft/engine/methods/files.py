"""Adapters on disk: adapter_config.json beside adapter_model.safetensors, for every method.

A method that PEFT has is kept as PEFT keeps it: what is written here loads there, and the other way round. Any other
one has `peft_type` EDGEPEFT_… and its config under `edgepeft` (`own_files`). Nothing pickled is ever read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from edgepeft.engine.methods import ENGINE_METHODS, engine_method_of, place
from edgepeft.engine.methods.adapter import AttachedAdapter, Parts
from edgepeft.engine.model.load import LoadedModel
from edgepeft.errors import BadInput
from edgepeft.library.peft_config import check_supported, method_id_of
from edgepeft.library.store import CONFIG_FILE, WEIGHTS_FILE
from edgepeft.methods import MethodConfig
from edgepeft.paths import write_atomic

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
    tensors = adapter.file_tensors()
    # The weights go first: a folder with a config is a folder that can be read.
    write_atomic(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
    write_atomic(folder / CONFIG_FILE, json.dumps(peft_config(adapter, base_name), indent=2, sort_keys=True) + "\n")


def peft_config(adapter: AttachedAdapter, base_name: str) -> dict[str, Any]:
    """The adapter's adapter_config.json."""
    return {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        **engine_method_of(adapter.config).settings_of(adapter),
    }


def read_adapter(folder: Path, loaded: LoadedModel, name: str) -> AttachedAdapter:
    """Reads an adapter, our own or PEFT's, and attaches it to `loaded` under `name`; it acts once it is set active.

    Raises:
        BadInput: a file is missing, damaged or pickled; the adapter is of a kind that is not supported; a tensor is
            missing, unknown to this model, misshaped or not finite. Nothing is attached then.
        UsageError: an adapter of this name is attached already.
    """
    config, parts = _restore(folder, loaded)
    return place(loaded, AttachedAdapter(name, config, parts))


def read_values(folder: Path, loaded: LoadedModel) -> dict[str, Tensor]:
    """The tensors of an adapter folder under the names of `AttachedAdapter.named_parameters`; nothing is attached.

    Raises:
        BadInput: as `read_adapter`.
    """
    config, parts = _restore(folder, loaded)
    return AttachedAdapter("", config, parts).state_dict()


def _restore(folder: Path, loaded: LoadedModel) -> tuple[MethodConfig, Parts]:
    settings = _read_config(folder / CONFIG_FILE)
    method = ENGINE_METHODS[method_id_of(settings, str(folder / CONFIG_FILE))]
    return method.restore(loaded, settings, _read_tensors(folder), folder)


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
