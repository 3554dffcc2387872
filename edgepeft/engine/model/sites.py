"""Where adapters can be put into a model: each site holds any number of named updates and the list of active ones.

Linears are sites themselves (`engine.model.linear`), and so are what stands before samples (`prefix`, `prompt`) and the
embedding and head (`tables`). Here are the branches of a decoder layer, whose results meet the residual stream, and the
gains of norms. A site without active updates runs the model's own code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from edgepeft.engine.model.linear import AdaptedLinear

BranchKind = Literal["attention", "mlp"]
_BRANCHES: Mapping[str, BranchKind] = {
    "self_attn": "attention",
    "attention": "attention",
    "attn": "attention",
    "mlp": "mlp",
    "feed_forward": "mlp",
    "block_sparse_moe": "mlp",
}
"""What transformers' decoder layers call their branches."""


class Site(Protocol):
    """A place where adapters can be put."""

    name: str
    """Path of its module."""
    adapters: dict[str, Any]
    """The updates that are resident, by the adapter's name."""
    active: list[tuple[str, float]]
    """Those that act, in this order, each with its strength."""

    def activate(self, active: Sequence[tuple[str, float]]) -> None:
        """Sets the active list."""
        ...


class BranchUpdate(Protocol):
    """What one adapter makes of a branch's result; recorded by autograd."""

    reads_output: bool
    """Whether it looks at the branch's result, or only adds to it."""

    def apply(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        """[..., hidden] from the branch's input x and its result y, with a strength."""
        ...


class Branch:
    """The attention or the MLP of one decoder layer: its result passes through the active updates, one after another.

    Args:
        module: the branch; its forward is replaced on the instance.
        name: its path in the model.
        kind: which of the two it is.
        last: the linear whose result is the branch's, where its layer can do without that in recomputation.
    """

    def __init__(self, module: nn.Module, name: str, kind: BranchKind, last: AdaptedLinear | None) -> None:
        self.name = name
        self.kind = kind
        self.module = module
        self.adapters: dict[str, BranchUpdate] = {}
        self.active: list[tuple[str, float]] = []
        self._last = last
        self._forward: Any = module.forward
        module.__dict__["forward"] = self._run

    def activate(self, active: Sequence[tuple[str, float]]) -> None:
        """See `Site`."""
        self.active = list(active)
        if self._last is not None:
            self._last.ends_layer = not any(self.adapters[name].reads_output for name, _ in active)

    def _run(self, *arguments: Any, **options: Any) -> Any:
        out = self._forward(*arguments, **options)
        if not self.active:
            return out
        x = arguments[0] if arguments else options["hidden_states"]
        y, *rest = out if isinstance(out, tuple) else (out,)
        several = isinstance(out, tuple)
        # Only the update decides how long the branch's own result lives.
        del out
        for name, scale in self.active:
            y = self.adapters[name].apply(x, y, scale)
        return (y, *rest) if several else y


class GainUpdate(Protocol):
    """What one adapter puts in place of a norm's parameters."""

    def parameters_of(self, own: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        """The parameters by name, float32, from those that the norm has by itself; recorded by autograd."""
        ...


class AdaptedNorm:
    """A norm whose gain (and bias) the active updates replace.

    Args:
        module: the norm; its forward is replaced on the instance.
        name: its path in the model.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.name = name
        self.module = module
        self.adapters: dict[str, GainUpdate] = {}
        self.active: list[tuple[str, float]] = []
        self._fused = "forward" in module.__dict__
        self._forward: Any = module.forward
        module.__dict__["forward"] = self._run

    def own(self) -> dict[str, Tensor]:
        """Its own parameters by name."""
        return dict(self.module.named_parameters())

    def activate(self, active: Sequence[tuple[str, float]]) -> None:
        """See `Site`."""
        self.active = list(active)

    def _run(self, x: Tensor) -> Tensor:
        if not self.active:
            out: Tensor = self._forward(x)
            return out
        values: dict[str, Tensor] = self.own()
        for name, scale in self.active:
            values = self.adapters[name].parameters_of(values, scale)
        if self._fused:
            out = self._forward(x, weight=values["weight"])
            return out
        # Under its own code, which a forward of the instance would hide.
        self.module.__dict__.pop("forward")
        try:
            out = torch.func.functional_call(
                self.module, {name: value.to(x.dtype) for name, value in values.items()}, (x,)
            )
        finally:
            self.module.__dict__["forward"] = self._run
        return out


def find_branches(model: nn.Module, layers: Sequence[nn.Module]) -> dict[str, Branch]:
    """The branches of all decoder layers by path, in the model's order; a layer of another build has none."""
    inside = {id(layer) for layer in layers}
    found: dict[str, Branch] = {}
    for path, parent in model.named_modules():
        if id(parent) not in inside:
            continue
        for child, module in parent.named_children():
            kind = _BRANCHES.get(child)
            if kind is not None:
                linears = [part for part in module.modules() if isinstance(part, AdaptedLinear)]
                last = next((linear for linear in linears if linear.ends_layer), None)
                found[f"{path}.{child}"] = Branch(module, f"{path}.{child}", kind, last)
    return found


def find_norms(model: nn.Module, decoder: nn.Module) -> dict[str, AdaptedNorm]:
    """Every norm of the decoder that has a gain, by path, in the model's order."""
    inside = {id(module) for module in decoder.modules()}
    return {
        path: AdaptedNorm(module, path)
        for path, module in model.named_modules()
        if id(module) in inside and is_norm(module)
    }


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm over its input's last dimension, with a gain."""
    gain = getattr(module, "weight", None)
    return type(module).__name__.endswith("Norm") and isinstance(gain, nn.Parameter) and gain.dim() == 1
