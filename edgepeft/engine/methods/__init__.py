"""The tensors of each PEFT method; each file has a light twin of the same name in edgepeft.methods.

An adapter is attached to a loaded model by name, stays resident, and acts when it is in the active list. Swapping
adapters is changing that list. `EngineMethod` is all that the rest of the engine knows of a method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from edgepeft.engine.methods import bias, bottleneck, compacter, full, ia3, lora, norm, prefix, prompt, sparse
from edgepeft.engine.methods.adapter import AttachedAdapter, Parts, Update, check_tensors
from edgepeft.engine.methods.targets import resolve_targets
from edgepeft.engine.model.load import LoadedModel
from edgepeft.errors import UsageError
from edgepeft.library.peft_config import PEFT_PREFIX
from edgepeft.methods import MethodConfig


class EngineMethod(Protocol):
    """What each module of a method offers."""

    def build(self, loaded: LoadedModel, config: Any, seed: int) -> Parts:
        """A fresh adapter's updates; training starts from the base.

        Raises:
            UsageError: the config does not suit this model.
        """
        ...

    def settings_of(self, adapter: AttachedAdapter) -> dict[str, Any]:
        """What goes into adapter_config.json beside the base's name."""
        ...

    def restore(
        self, loaded: LoadedModel, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
    ) -> tuple[MethodConfig, Parts]:
        """An adapter from its file.

        Args:
            loaded: the base.
            settings: adapter_config.json.
            tensors: of the file, by their keys.
            folder: where it was read, for messages.

        Raises:
            BadInput: a setting cannot be meant; a tensor is missing, unknown, misshaped or not finite.
        """
        ...


ENGINE_METHODS: dict[str, EngineMethod] = {
    "lora": lora,
    "bottleneck": bottleneck,
    "compacter": compacter,
    "ia3": ia3,
    "norm": norm,
    "bias": bias,
    "prefix": prefix,
    "full": full,
    "prompt": prompt,
    "sparse": sparse,
}
"""Every method's tensors by its id; the ids are those of edgepeft.methods.METHODS."""


def engine_method_of(config: MethodConfig) -> EngineMethod:
    """The module that a config belongs to."""
    return ENGINE_METHODS[str(config.__struct_config__.tag)]


def attach(loaded: LoadedModel, name: str, config: MethodConfig, seed: int) -> AttachedAdapter:
    """Makes a fresh adapter on `loaded`; it acts once `set_active` names it.

    Raises:
        UsageError: an adapter of this name is there already, or the config does not suit the model.
    """
    return place(loaded, AttachedAdapter(name, config, engine_method_of(config).build(loaded, config, seed)))


def place(loaded: LoadedModel, adapter: AttachedAdapter) -> AttachedAdapter:
    """Puts an adapter's updates onto the sites that it names.

    Raises:
        UsageError: an adapter of this name is resident already.
    """
    sites = loaded.sites()
    if any(adapter.name in site.adapters for site in sites.values()):
        raise UsageError(f"an adapter named {adapter.name!r} is attached already", hint="Detach it first")
    for path, update in adapter.updates.items():
        sites[path].adapters[adapter.name] = update
    return adapter


def set_active(loaded: LoadedModel, active: Sequence[tuple[str, float]]) -> None:
    """Lets exactly these adapters act, each with its strength; 1 is as trained, an empty list is the base alone.

    Raises:
        UsageError: a name is not resident, or stands in the list twice.
    """
    sites = loaded.sites()
    resident = {name for site in sites.values() for name in site.adapters}
    names = [name for name, _ in active]
    for name in names:
        if name not in resident:
            known = ", ".join(sorted(resident)) or "none"
            raise UsageError(f"no adapter named {name!r} is attached", hint=f"Attached: {known}")
        if names.count(name) > 1:
            raise UsageError(f"adapter {name!r} is named twice", hint="Add up its strengths")
    for site in sites.values():
        # A strength of 0 is left out: the base's own values come back to the bit.
        site.activate([(name, scale) for name, scale in active if name in site.adapters and scale != 0])


def detach(loaded: LoadedModel, name: str) -> None:
    """Removes an adapter; the others stay as they are.

    Raises:
        UsageError: no adapter of this name is resident.
    """
    found = False
    for site in loaded.sites().values():
        if name in site.adapters:
            found = True
            site.activate([use for use in site.active if use[0] != name])
            del site.adapters[name]
    if not found:
        raise UsageError(f"no adapter named {name!r} is attached")


__all__ = [
    "ENGINE_METHODS",
    "PEFT_PREFIX",
    "AttachedAdapter",
    "EngineMethod",
    "Parts",
    "Update",
    "attach",
    "check_tensors",
    "detach",
    "engine_method_of",
    "place",
    "resolve_targets",
    "set_active",
]
