"""The tensors of bottleneck adapters; config, papers and counts are in edgepeft.methods.bottleneck.

`y + s (f(h Dᵀ + d) Uᵀ + u)` with D [width, hidden] and U [hidden, width], where h is the branch's result y, or its
input in the parallel form. One autograd function keeps h and what goes into f; f's result is formed again.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from edgepeft.engine.methods import own_files
from edgepeft.engine.methods.adapter import Parts
from edgepeft.engine.methods.seeds import generator_of
from edgepeft.engine.model.activation import Activation, act, act_backward
from edgepeft.engine.model.load import LoadedModel
from edgepeft.engine.model.sites import Branch
from edgepeft.errors import UsageError
from edgepeft.methods.bottleneck import BottleneckConfig

settings_of = own_files.settings_of


class Map(Protocol):
    """An affine map with trained tensors."""

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """Its own tensors, float32."""
        ...

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors that it uses, shared ones included."""
        ...

    def apply(self, x: Tensor) -> Tensor:
        """[tokens, in] to [tokens, out], in x's dtype."""
        ...

    def gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """Of `tensors()`, in their order, float32, for g [tokens, out]."""
        ...

    def back(self, g: Tensor, onto: Tensor | None = None) -> Tensor:
        """The gradient of x for g, added to `onto` where there is one; a new tensor."""
        ...


class DenseMap:
    """`x Wᵀ + b` with W [out, in] and b [out]."""

    def __init__(self, name: str, weight: Tensor, device: torch.device) -> None:
        self._name = name
        self.weight = nn.Parameter(weight.to(device))
        self.bias = nn.Parameter(torch.zeros(weight.shape[0], device=device))

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """See `Map`."""
        return {f"{self._name}.weight": self.weight, f"{self._name}.bias": self.bias}

    def tensors(self) -> tuple[Tensor, ...]:
        """See `Map`."""
        return self.weight, self.bias

    def apply(self, x: Tensor) -> Tensor:
        """See `Map`."""
        out = x @ self.weight.to(x.dtype).t()
        out += self.bias.to(x.dtype)
        return out

    def gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """See `Map`."""
        return (g.t() @ x).to(self.weight.dtype), g.sum(0, dtype=self.bias.dtype)

    def back(self, g: Tensor, onto: Tensor | None = None) -> Tensor:
        """See `Map`."""
        weight = self.weight.to(g.dtype)
        return g @ weight if onto is None else torch.addmm(onto, g, weight)


class BottleneckUpdate:
    """Down, a non-linearity, up, behind or beside one branch."""

    def __init__(self, down: Map, up: Map, activation: Activation, scale: float, *, reads_output: bool) -> None:
        self.down = down
        self.up = up
        self.activation = activation
        self.scale = scale
        self.reads_output = reads_output

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """Those of both maps."""
        return self.down.named_tensors() | self.up.named_tensors()

    def tensors(self) -> tuple[Tensor, ...]:
        """Those of both maps, shared ones included."""
        return *self.down.tensors(), *self.up.tensors()

    def apply(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        """See `BranchUpdate`."""
        call: Any = _Bottleneck.apply
        out: Tensor = call(None if self.reads_output else x, y, self, self.scale * scale, *self.tensors())
        return out


class _Bottleneck(torch.autograd.Function):
    """y + s · up(f(down(h))), for h of y's shape; h is y where x is None."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor | None, y: Tensor, update: BottleneckUpdate, scale: float, *tensors: Tensor
    ) -> Tensor:
        read = y if x is None else x
        inner = update.down.apply(_rows(read))
        out = update.up.apply(act(inner, update.activation, torch.empty_like(inner)))
        out = out.mul_(scale).add_(_rows(y)).view_as(y)
        ctx.update, ctx.scale, ctx.beside = update, scale, x is not None
        # The trained tensors are saved too, so that autograd notices when one changes before backward.
        ctx.save_for_backward(read, inner, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        read, inner, *_ = ctx.saved_tensors
        update, rows, g = ctx.update, _rows(read), _rows(gradient)
        # A factor of 1 is the usual one; any other needs a copy.
        scaled = g if ctx.scale == 1 else g * ctx.scale
        hidden = act(inner, update.activation, torch.empty_like(inner))
        up = update.up.gradients(hidden, scaled)
        del hidden
        g_inner = update.up.back(scaled)
        del scaled
        act_backward(g_inner, inner, update.activation)
        down = update.down.gradients(rows, g_inner)
        if ctx.beside:
            needed = ctx.needs_input_grad[0]
            grad_x = update.down.back(g_inner).view_as(read) if needed else None
            return grad_x, gradient, None, None, *down, *up
        needed = ctx.needs_input_grad[1]
        grad_y = update.down.back(g_inner, g).view_as(read) if needed else None
        return None, grad_y, None, None, *down, *up


def build(loaded: LoadedModel, config: BottleneckConfig, seed: int) -> Parts:
    """See `EngineMethod`: D uniform within ±1/√hidden, U and both biases zero.

    Raises:
        UsageError: the layers of the model have no branches that are known here.
    """
    hidden, width = loaded.shape.hidden, config.width(loaded.shape.hidden)

    def update(path: str) -> BottleneckUpdate:
        down = torch.empty(width, hidden)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator_of(seed, path))
        return BottleneckUpdate(
            DenseMap("adapter_down", down, loaded.device),
            DenseMap("adapter_up", torch.zeros(hidden, width), loaded.device),
            (config.activation, "none"),
            config.scale,
            reads_output=config.placement != "parallel",
        )

    return Parts({path: update(path) for path in branches_of(loaded, config.branches)})


def branches_of(loaded: LoadedModel, kinds: tuple[str, ...]) -> dict[str, Branch]:
    """The branches of these kinds, by path.

    Raises:
        UsageError: a layer has none of a kind.
    """
    found = {path: branch for path, branch in loaded.branches().items() if branch.kind in kinds}
    if len(found) != len(kinds) * len(loaded.layers):
        raise UsageError(
            f"the layers of {type(loaded.model).__name__} have no {' and '.join(kinds)} of their own",
            where="--method",
            hint="Use lora, which changes linear layers",
        )
    return found


restore = partial(own_files.restore_own, BottleneckConfig, build)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
