"""Methods that PEFT does not have, on disk.

adapter_config.json names the method as `peft_type` EDGEPEFT_ID and holds its config under `edgepeft`, field by field.
adapter_model.safetensors holds every trained tensor in float32 under `base_model.model.` + the path of the module that
it changes + its own name, and what several modules share under `base_model.model.` + its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from torch import Tensor

from edgepeft.engine.methods.adapter import AttachedAdapter, Parts
from edgepeft.engine.model.load import LoadedModel
from edgepeft.errors import BadInput, EdgepeftError
from edgepeft.library.peft_config import OWN_KEY, OWN_PREFIX, PEFT_PREFIX
from edgepeft.library.store import CONFIG_FILE, WEIGHTS_FILE
from edgepeft.library.tensors import from_layers
from edgepeft.methods import MethodConfig

Config = TypeVar("Config", bound=MethodConfig)


def settings_of(adapter: AttachedAdapter) -> dict[str, Any]:
    """See `EngineMethod`."""
    config = adapter.config
    return {
        "peft_type": OWN_PREFIX + str(config.__struct_config__.tag).upper(),
        OWN_KEY: msgspec.to_builtins(config),
    }


def restore_own(
    kind: type[Config],
    build: Callable[[LoadedModel, Config, int], Parts],
    loaded: LoadedModel,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    folder: Path,
) -> tuple[Config, Parts]:
    """The adapter as `build` makes it, with the values of the file.

    Raises:
        BadInput: as `EngineMethod.restore`.
    """
    try:
        config = msgspec.convert(settings.get(OWN_KEY), kind)
        parts = build(loaded, config, 0)
    except (msgspec.ValidationError, EdgepeftError) as error:
        what = error.what if isinstance(error, EdgepeftError) else str(error)
        raise BadInput(
            what, where=str(folder / CONFIG_FILE), hint="It belongs to another base, or is damaged"
        ) from error
    load_values(AttachedAdapter("", config, parts), tensors, folder)
    return config, parts


def load_values(adapter: AttachedAdapter, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Copies a file's tensors into an adapter that has the same ones.

    Raises:
        BadInput: one is missing, unknown, misshaped or not finite.
    """
    own = adapter.state_dict()
    by_ending = {from_layers(name): name for name in own}
    values = {}
    for key, value in tensors.items():
        name = key.removeprefix(PEFT_PREFIX)
        values[name if name in own else by_ending.get(from_layers(name), name)] = value
    adapter.load_state_dict(values, where=str(folder / WEIGHTS_FILE))
