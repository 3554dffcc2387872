"""The tensors of norm tuning; config and paper are in edgepeft.methods.norm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgepeft.engine.methods.adapter import AttachedAdapter, Parts, trained_copy
from edgepeft.engine.methods.own_files import load_values
from edgepeft.engine.model.load import LoadedModel
from edgepeft.engine.model.sites import AdaptedNorm
from edgepeft.errors import BadInput, UsageError
from edgepeft.library.store import CONFIG_FILE
from edgepeft.methods.norm import NormConfig
from edgepeft.methods.targets import means


class NormUpdate:
    """A trained copy of each parameter of one norm.

    Args:
        trained: the copies, by name.
        prefix: of their names in a file.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], prefix: str = "ln_tuning_layers.") -> None:
        self._prefix = prefix
        self._trained = dict(trained)

    @classmethod
    def on(cls, norm: AdaptedNorm, loaded: LoadedModel, prefix: str = "ln_tuning_layers.") -> NormUpdate:
        """Copies of what a norm has."""
        return cls({name: trained_copy(value, loaded) for name, value in norm.own().items()}, prefix)

    @property
    def alters(self) -> tuple[str, ...]:
        """All that the norm has."""
        return tuple(self._trained)

    def merge_into(self, parameter: str, values: Tensor, rows: slice) -> None:
        """The copies take their place; see `Mergeable`."""
        values.copy_(self._trained[parameter].detach()[rows])

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """By their names in a file; PEFT's have its own prefix."""
        return {f"{self._prefix}{name}": value for name, value in self._trained.items()}

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return tuple(self._trained.values())

    def parameters_of(self, own: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        """See `GainUpdate`: the trained copies, or what lies between them and the norm's own."""
        if scale == 1:
            return dict(self._trained)
        return {name: torch.lerp(own[name].float(), value.float(), scale) for name, value in self._trained.items()}


def build(loaded: LoadedModel, config: NormConfig, seed: int) -> Parts:
    """See `EngineMethod`: copies of what the norms have.

    Raises:
        UsageError: a name matches no norm.
    """
    found = loaded.norms()
    for target in config.norms:
        if not any(_means(target, path) for path in found):
            known = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in found}))
            raise UsageError(f"{target!r} matches no norm of this model", where="norms", hint=f"It has: {known}")
    return Parts(
        {
            path: NormUpdate.on(norm, loaded)
            for path, norm in found.items()
            if any(_means(target, path) for target in config.norms)
        }
    )


def _means(target: str, path: str) -> bool:
    return target == "all" or means(target, path)


def settings_of(adapter: AttachedAdapter) -> dict[str, Any]:
    """See `EngineMethod`."""
    return {
        "peft_type": "LN_TUNING",
        "target_modules": sorted({path.rsplit(".", 1)[-1] for path in adapter.updates}),
        "exclude_modules": None,
        "modules_to_save": None,
    }


def restore(
    loaded: LoadedModel, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> tuple[NormConfig, Parts]:
    """See `EngineMethod`."""
    where = str(folder / CONFIG_FILE)
    named = settings.get("target_modules")
    if not isinstance(named, list):
        raise BadInput("target_modules must be a list", where=where, hint="Save the adapter with a list of names")
    endings = {path.rsplit(".", 1)[-1] for path in loaded.norms()}
    config = NormConfig(("all",) if set(named) == endings else tuple(sorted(map(str, named))))
    try:
        parts = build(loaded, config, 0)
    except UsageError as error:
        raise BadInput(error.what, where=where, hint="It belongs to another base, or is damaged") from error
    load_values(AttachedAdapter("", config, parts), tensors, folder)
    return config, parts
