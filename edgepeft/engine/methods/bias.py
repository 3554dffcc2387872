"""The tensors of bias tuning; config and paper are in edgepeft.methods.bias.

`x Wᵀ + b + d` with a trained d, float32 [1, out]. PEFT's BEFT (bias-efficient fine-tuning) adds the same, so its files
are used; it also adds d where a linear has no bias, and such files are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgepeft.engine.methods.adapter import AttachedAdapter, Parts
from edgepeft.engine.methods.own_files import load_values
from edgepeft.engine.methods.targets import adaptable, resolve_targets
from edgepeft.engine.model.linear import LinearUpdate
from edgepeft.engine.model.load import LoadedModel
from edgepeft.errors import BadInput, UsageError
from edgepeft.library.store import CONFIG_FILE
from edgepeft.methods.bias import BiasConfig, no_bias


class BiasUpdate(LinearUpdate):
    """What is added to the bias of one linear.

    Args:
        rows: of its weight.
        device: of the model.
    """

    alters = ("bias",)

    def __init__(self, rows: int, device: torch.device) -> None:
        self.offset = nn.Parameter(torch.zeros(1, rows, device=device))

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """The offset, as PEFT's files name it."""
        return {"beft_bias": self.offset}

    def tensors(self) -> tuple[Tensor, ...]:
        """The offset."""
        return (self.offset,)

    def add_forward(self, x: Tensor, y: Tensor, scale: float) -> tuple[Tensor, ...]:
        """y += s d; keeps nothing."""
        y.add_(self.offset.to(y.dtype), alpha=scale)
        return ()

    def add_backward(
        self, x: Tensor | None, g: Tensor, grad_x: Tensor | None, scale: float, kept: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """dd = s Σ g over the tokens."""
        return (g.sum(0, keepdim=True).to(self.offset.dtype).mul_(scale),)

    def merge_into(self, parameter: str, values: Tensor, rows: slice) -> None:
        """b += d; see `Mergeable`."""
        values.add_(self.offset.detach()[0, rows])


def build(loaded: LoadedModel, config: BiasConfig, seed: int) -> Parts:
    """See `EngineMethod`: all offsets are 0.

    Raises:
        UsageError: the model has no biases, or a name matches no linear that has one.
    """
    linears = adaptable(loaded.linears())
    biased = [path for path, linear in linears.items() if linear.bias is not None]
    chosen = biased
    if config.targets != ("all",) and biased:
        chosen = resolve_targets(config.targets, linears)
    without = sorted({path.rsplit(".", 1)[-1] for path in chosen if path not in set(biased)})
    if without or not biased:
        raise no_bias(tuple(without), {path.rsplit(".", 1)[-1] for path in biased})
    return _parts(loaded, chosen)


def settings_of(adapter: AttachedAdapter) -> dict[str, Any]:
    """See `EngineMethod`."""
    config: Any = adapter.config
    # By whole paths where an ending would also match what has no bias, such as a vision tower's layers.
    named = sorted(adapter.updates) if config.targets == ("all",) else sorted(config.targets)
    return {"peft_type": "BEFT", "target_modules": named, "modules_to_save": None, "init_weights": True}


def restore(
    loaded: LoadedModel, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> tuple[BiasConfig, Parts]:
    """See `EngineMethod`."""
    where = str(folder / CONFIG_FILE)
    named = settings.get("target_modules")
    if not isinstance(named, list) or not named:
        raise BadInput("target_modules must be a list", where=where, hint="Save the adapter with a list of names")
    linears = adaptable(loaded.linears())
    targets = tuple(sorted(map(str, named)))
    try:
        chosen = resolve_targets(targets, linears)
    except UsageError as error:
        raise BadInput(error.what, where=where, hint="It belongs to another base, or is damaged") from error
    every = [path for path, linear in linears.items() if linear.bias is not None]
    parts = _parts(loaded, chosen)
    config = BiasConfig(("all",) if chosen == every else targets)
    load_values(AttachedAdapter("", config, parts), tensors, folder)
    return config, parts


def _parts(loaded: LoadedModel, paths: Iterable[str]) -> Parts:
    linears = loaded.linears()
    return Parts({path: BiasUpdate(linears[path].weight_source.shape[0], loaded.device) for path in paths})
