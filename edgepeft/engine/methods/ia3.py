"""The tensors of IA³; config and paper are in edgepeft.methods.ia3.

Factors are float32; what they multiply stays in the compute dtype. A strength s uses 1 + s (l - 1).
"""

from __future__ import annotations

from collections.abc import Mapping
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
from edgepeft.methods.ia3 import Ia3Config


class Ia3Update(LinearUpdate):
    """The factors of one linear: of its result, or of its input.

    Args:
        factors: [out, 1] for results, [1, in] for inputs, as PEFT has them.
    """

    def __init__(self, factors: Tensor) -> None:
        self.factors = nn.Parameter(factors)
        self.rescales_input = factors.shape[0] == 1

    @property
    def rescales_output(self) -> bool:
        """Where the factors are those of the result."""
        return not self.rescales_input

    @property
    def alters(self) -> tuple[str, ...]:
        """A result is multiplied with its bias in it."""
        return ("weight",) if self.rescales_input else ("weight", "bias")

    def merge_into(self, parameter: str, values: Tensor, rows: slice) -> None:
        """Columns or rows of W are multiplied, and entries of the bias; see `Mergeable`."""
        factors = self.factors.detach()
        if not self.rescales_input:
            factors = factors[rows]
        values.mul_(factors.view(-1) if parameter == "bias" else factors)

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """The factors, as PEFT's files name them."""
        return {"ia3_l": self.factors}

    def tensors(self) -> tuple[Tensor, ...]:
        """The factors."""
        return (self.factors,)

    def add_forward(self, x: Tensor, y: Tensor, scale: float) -> tuple[Tensor, ...]:
        """y ⊙= l; keeps y as it was."""
        before = y.clone()
        y.mul_(self._row(scale, y.dtype))
        return (before,)

    def change_gradient(self, g: Tensor, scale: float) -> Tensor:
        """g ⊙ l: the gradient of what was multiplied."""
        return g * self._row(scale, g.dtype)

    def add_backward(
        self, x: Tensor | None, g: Tensor, grad_x: Tensor | None, scale: float, kept: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """dl = s Σ g ⊙ y over the tokens."""
        (before,) = kept
        return (self._gradient(g, before, scale),)

    def rescale_input(self, x: Tensor, scale: float) -> Tensor:
        """x ⊙ l, recorded by autograd."""
        call: Any = _ScaledInput.apply
        out: Tensor = call(x, self, scale, self.factors)
        return out

    def _row(self, scale: float, dtype: torch.dtype) -> Tensor:
        """[entries] in the compute dtype."""
        row = self.factors.detach().flatten()
        return (row if scale == 1 else 1 + scale * (row - 1)).to(dtype)

    def _gradient(self, g: Tensor, of: Tensor, scale: float) -> Tensor:
        found = (g * of).sum(0, dtype=self.factors.dtype)
        return (found if scale == 1 else found.mul_(scale)).view_as(self.factors)


class _ScaledInput(torch.autograd.Function):
    """x ⊙ l; keeps x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Ia3Update, scale: float, factors: Tensor) -> Tensor:
        ctx.update, ctx.scale = update, scale
        ctx.save_for_backward(x, factors)
        return x * update._row(scale, x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, _ = ctx.saved_tensors
        update, scale = ctx.update, ctx.scale
        width = x.shape[-1]
        grad = update._gradient(g.reshape(-1, width), x.reshape(-1, width), scale) if ctx.needs_input_grad[3] else None
        return update.change_gradient(g, scale) if ctx.needs_input_grad[0] else None, None, None, grad


def build(loaded: LoadedModel, config: Ia3Config, seed: int) -> Parts:
    """See `EngineMethod`: all factors are 1.

    Raises:
        UsageError: a name matches no linear, or one linear is named as both.
    """
    linears = adaptable(loaded.linears())
    outputs, inputs = (set(resolve_targets(names, linears)) for names in (config.outputs, config.inputs))
    if both := outputs & inputs:
        raise UsageError(f"{min(both)} cannot be multiplied before and after", where="inputs", hint="Choose one")
    updates: dict[str, Ia3Update] = {}
    for path in (path for path in linears if path in outputs | inputs):
        out_features, in_features = linears[path].weight_source.shape
        size = (1, in_features) if path in inputs else (out_features, 1)
        updates[path] = Ia3Update(torch.ones(size, device=loaded.device))
    return Parts(updates)


def settings_of(adapter: AttachedAdapter) -> dict[str, Any]:
    """See `EngineMethod`."""
    config: Any = adapter.config
    return {
        "peft_type": "IA3",
        "target_modules": sorted((*config.outputs, *config.inputs)),
        "feedforward_modules": sorted(config.inputs),
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
        "modules_to_save": None,
    }


def restore(
    loaded: LoadedModel, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> tuple[Ia3Config, Parts]:
    """See `EngineMethod`."""
    where = str(folder / CONFIG_FILE)
    named, inner = settings.get("target_modules"), settings.get("feedforward_modules") or []
    if not isinstance(named, list) or not isinstance(inner, list):
        hint = "Save the adapter with lists of module names"
        raise BadInput("target_modules and feedforward_modules must be lists", where=where, hint=hint)
    try:
        config = Ia3Config(tuple(sorted(set(map(str, named)) - set(map(str, inner)))), tuple(sorted(map(str, inner))))
        parts = build(loaded, config, 0)
    except UsageError as error:
        raise BadInput(error.what, where=where, hint="It belongs to another base, or is damaged") from error
    load_values(AttachedAdapter("", config, parts), tensors, folder)
    return config, parts
