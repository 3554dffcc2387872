"""A linear layer whose weight is frozen and to which any number of named adapters can be attached.

One autograd function computes the frozen product and the updates of all active adapters. It keeps the input and what an
update asks for, never a dense weight: backward dequantizes the weight again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from edgepeft.engine.model.frozen import FrozenWeight


class LinearUpdate(Protocol):
    """What one adapter adds to the product of one linear layer; every PEFT method for linears implements it.

    `scale` is the strength of use: 1 is as trained. Calls come from inside an autograd function, so nothing in them is
    recorded by autograd.
    """

    def tensors(self) -> tuple[Tensor, ...]:
        """The trainable tensors, float32."""
        ...

    def add_forward(self, x: Tensor, y: Tensor, scale: float) -> tuple[Tensor, ...]:
        """Adds the update for x [tokens, in] to y [tokens, out] in place; returns what to keep for backward."""
        ...

    def add_backward(
        self, x: Tensor | None, g: Tensor, grad_x: Tensor | None, scale: float, kept: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """Adds the update's part to `grad_x` [tokens, in] in place, where there is one.

        Returns the gradients of `tensors()`, in their order, for g [tokens, out]; x is None, and so are they, when no
        tensor is trained.
        """
        ...


class AdaptedLinear(nn.Module):
    """`x Wᵀ + bias` with a frozen W, plus the updates of the active adapters.

    Adapters live in a plain dict: their tensors are parameters of the adapter, not of the model, so the model stays
    frozen as a whole.
    """

    def __init__(self, weight_source: FrozenWeight, bias: Tensor | None, name: str) -> None:
        super().__init__()
        self.weight_source = weight_source
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.name = name
        """Module path in the model."""
        self.out_features, self.in_features = weight_source.shape
        self.adapters: dict[str, LinearUpdate] = {}
        self.active: list[tuple[str, float]] = []

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in x's dtype."""
        updates = [(self.adapters[name], scale) for name, scale in self.active]
        tensors = [tensor for update, _ in updates for tensor in update.tensors()]
        return _product(x, self.weight_source, self.bias, updates, *tensors)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        kind = type(self.weight_source).__name__
        return f"in_features={self.in_features}, out_features={self.out_features}, weight={kind}, active={self.active}"


class _AdaptedProduct(torch.autograd.Function):
    """The frozen product and the updates of the active adapters; no gradient is formed for W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: FrozenWeight,
        bias: Tensor | None,
        updates: Sequence[tuple[LinearUpdate, float]],
        *tensors: Tensor,
    ) -> Tensor:
        y = weight.matmul(x)
        if bias is not None:
            y += bias
        kept: list[Tensor] = []
        counts: list[int] = []
        if updates:
            x_rows, y_rows = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
            for update, scale in updates:
                keeps = update.add_forward(x_rows, y_rows, scale)
                kept += keeps
                counts.append(len(keeps))
        ctx.weight = weight
        ctx.updates = updates
        ctx.counts = counts
        ctx.trains = any(ctx.needs_input_grad[4:])
        # The trainable tensors are saved too, so that autograd notices when one changes before backward.
        ctx.save_for_backward(*([x] if ctx.trains else []), *kept, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        x = saved.pop(0) if ctx.trains else None
        grad_x = ctx.weight.matmul_transposed(g) if ctx.needs_input_grad[0] else None
        grads: list[Tensor | None] = []
        if ctx.updates:
            x_rows = None if x is None else x.reshape(-1, x.shape[-1])
            g_rows = g.reshape(-1, g.shape[-1])
            grad_x_rows = None if grad_x is None else grad_x.view(-1, grad_x.shape[-1])
            for (update, scale), count in zip(ctx.updates, ctx.counts, strict=True):
                kept, saved = tuple(saved[:count]), saved[count:]
                grads += update.add_backward(x_rows, g_rows, grad_x_rows, scale, kept)
        return (grad_x, None, None, None, *grads)


_product: Callable[..., Tensor] = _AdaptedProduct.apply
