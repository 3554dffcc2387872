"""A linear layer whose weight is frozen and to which any number of named adapters can be attached.

One autograd function computes the frozen product and the updates of all active adapters. It keeps the input and what an
update asks for, never a dense weight: backward dequantizes the weight again. Linears that read the same input (queries,
keys and values; gate and up) are computed by one such function together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from edgepeft.engine.model.frozen import FrozenWeight

Kept = tuple[Tensor, ...]
Gradients = tuple[Tensor | None, ...]


class LinearUpdate(ABC):
    """What one adapter adds to the product of one linear layer; every PEFT method for linears derives from it.

    `scale` is the strength of use: 1 is as trained. Calls come from inside an autograd function, so nothing in them is
    recorded by autograd. By itself an update adds nothing and changes nothing of what it is added to.
    """

    rescales_input = False
    """Whether it multiplies the input of the linear, and does nothing else."""
    keeps_input = False
    """Whether its gradients need the linear's input."""
    replaces_weight = False
    """Whether it puts a matrix of its own in the frozen one's place."""

    @property
    def rescales_output(self) -> bool:
        """Whether it multiplies what is in y already; what came before it then sees another gradient."""
        return False

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The trainable tensors, float32."""

    def add_forward(self, x: Tensor, y: Tensor, scale: float) -> Kept:
        """Adds the update for x [tokens, in] to y [tokens, out] in place; returns what to keep for backward."""
        return ()

    def change_gradient(self, g: Tensor, scale: float) -> Tensor:
        """The gradient of what was in y before, for g [tokens, out] of what is in it after; a new tensor where it
        differs."""
        return g

    def rescale_input(self, x: Tensor, scale: float) -> Tensor:
        """What the linear is given in place of x [..., in]; called outside of the function, recorded by autograd."""
        return x

    def replace(self, weight: FrozenWeight, bias: Tensor | None, scale: float) -> tuple[FrozenWeight, Tensor | None]:
        """What is multiplied with and added in place of `weight` and `bias`; asked where `replaces_weight`."""
        return weight, bias

    @abstractmethod
    def add_backward(self, x: Tensor | None, g: Tensor, grad_x: Tensor | None, scale: float, kept: Kept) -> Gradients:
        """Adds the update's part to `grad_x` [tokens, in] in place, where there is one.

        Returns the gradients of `tensors()`, in their order, for g [tokens, out]. x is None where no tensor is
        trained, and where no update keeps it.
        """

    def together(self, uses: Sequence[Use]) -> SharedUpdate | None:
        """One update that does the work of several, each of another linear with the same input; this one is the first
        of them. None where they have nothing to share."""
        return None


class SharedUpdate(Protocol):
    """The updates of several linears that read the same input."""

    def add_forward(self, x: Tensor, ys: Sequence[Tensor]) -> Kept:
        """As `LinearUpdate.add_forward`, for each linear's output."""
        ...

    def add_backward(self, x: Tensor | None, gs: Sequence[Tensor], grad_x: Tensor | None, kept: Kept) -> Gradients:
        """As `LinearUpdate.add_backward`; the gradients of all tensors, linear by linear."""
        ...


class Use(NamedTuple):
    """An update and the strength with which it is used."""

    update: LinearUpdate
    scale: float


class _Part(NamedTuple):
    """One linear of a product."""

    weight: FrozenWeight
    bias: Tensor | None
    uses: list[Use]


# A plain global: backward on CUDA runs in another thread, which sees neither thread-locals nor context variables.
_recomputing = False


@contextmanager
def recomputing(again: bool) -> Iterator[None]:
    """Says whether a layer runs only for what its backward needs: its result is thrown away."""
    global _recomputing
    before, _recomputing = _recomputing, again
    try:
        yield
    finally:
        _recomputing = before


class AdaptedLinear(nn.Module):
    """`x Wᵀ + bias` with a frozen W, or what takes its place, plus the updates of the active adapters.

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
        self.ends_layer = False
        """Whether nothing but a sum uses its result, so that a layer that runs again can do without it."""
        self.shares_input: SharedInput | None = None
        """The linears that are given the same input; None where it stands alone."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out], in x's dtype."""
        if self.shares_input is not None:
            return self.shares_input.product(self, x)
        return self.alone(x, skip=self.ends_layer and _recomputing)

    def alone(self, x: Tensor, *, skip: bool = False) -> Tensor:
        """The same, computed by itself; with `skip`, only what backward needs."""
        for name, scale in self.active:
            if self.adapters[name].rescales_input:
                x = self.adapters[name].rescale_input(x, scale)
        return _product(x, [self], skip=skip)[0]

    @property
    def rescales_input(self) -> bool:
        """Whether it sees another input than it is given."""
        return any(self.adapters[name].rescales_input for name, _ in self.active)

    def activate(self, active: Sequence[tuple[str, float]]) -> None:
        """Lets exactly these of its updates act, in this order, each with its strength."""
        self.active = list(active)

    def part(self) -> _Part:
        """What computes its product now."""
        uses = [Use(self.adapters[name], scale) for name, scale in self.active]
        weight: FrozenWeight = self.weight_source
        bias: Tensor | None = self.bias
        for use in uses:
            if use.update.replaces_weight:
                weight, bias = use.update.replace(weight, bias, use.scale)
        return _Part(weight, bias, [use for use in uses if not use.update.rescales_input])

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        kind = type(self.weight_source).__name__
        return f"in_features={self.in_features}, out_features={self.out_features}, weight={kind}, active={self.active}"


class SharedInput:
    """Linears that a model calls one after the other with the same tensor.

    The call of the first one computes all of them; the others find their results.
    """

    def __init__(self, members: Sequence[AdaptedLinear]) -> None:
        self._members = list(members)
        self._input: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}
        for member in members:
            member.shares_input = self

    def product(self, linear: AdaptedLinear, x: Tensor) -> Tensor:
        """What `linear` makes of x."""
        if any(member.rescales_input for member in self._members):
            return linear.alone(x)
        if linear is self._members[0]:
            self.forget()
            results = _product(x, self._members)
            self._input = x
            self._waiting = {id(member): result for member, result in zip(self._members, results, strict=True)}
        found = self._waiting.pop(id(linear), None) if self._input is x else None
        if not self._waiting:
            self._input = None
        return linear.alone(x) if found is None else found

    def forget(self) -> None:
        """Drops results that were not asked for: those of a forward that was left in the middle."""
        self._input, self._waiting = None, {}


def _product(x: Tensor, linears: Sequence[AdaptedLinear], *, skip: bool = False) -> tuple[Tensor, ...]:
    """The products of linears with one input; with `skip`, only what backward needs is computed."""
    parts = [linear.part() for linear in linears]
    tensors = [tensor for part in parts for use in part.uses for tensor in use.update.tensors()]
    return _apply(x, parts, skip, *tensors)


class _AdaptedProduct(torch.autograd.Function):
    """Frozen products of one input and the updates of the active adapters; no gradient is formed for a weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Sequence[_Part], skip: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        # What multiplies a result has to see it again.
        ys = tuple(_frozen_product(x, part, skip=skip and not _rescales(part)) for part in parts)
        kept: list[Tensor] = []
        counts: list[int] = []
        shared = _shared(parts)
        x_rows = x.reshape(-1, x.shape[-1])
        y_rows = [y.view(-1, y.shape[-1]) for y in ys]
        if shared is not None:
            kept += shared.add_forward(x_rows, y_rows)
        else:
            for part, rows in zip(parts, y_rows, strict=True):
                for use in part.uses:
                    keeps = use.update.add_forward(x_rows, rows, use.scale)
                    kept += keeps
                    counts.append(len(keeps))
        ctx.parts = parts
        ctx.shared = shared
        ctx.counts = counts
        ctx.keeps_x = any(ctx.needs_input_grad[3:]) and any(
            use.update.keeps_input for part in parts for use in part.uses
        )
        # The trainable tensors are saved too, so that autograd notices when one changes before backward.
        ctx.save_for_backward(*([x] if ctx.keeps_x else []), *kept, *tensors)
        ctx.kept = len(kept)
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs: Tensor) -> tuple[Any, ...]:
        saved = list(ctx.saved_tensors)
        x = saved.pop(0) if ctx.keeps_x else None
        kept = saved[: ctx.kept]
        del saved
        g_rows = [g.reshape(-1, g.shape[-1]) for g in gs]
        # For each update the gradient of y as it left it, and for the frozen product that of y as it came.
        g_uses = [_gradients_of_uses(part, rows) for part, rows in zip(ctx.parts, g_rows, strict=True)]
        grad_x = grad_rows = None
        if ctx.needs_input_grad[0]:
            (first, *others), (g_first, *g_others) = ctx.parts, [of_part[-1] for of_part in g_uses]
            grad_x = first.weight.matmul_transposed(g_first.view_as(gs[0]))
            grad_rows = grad_x.view(-1, grad_x.shape[-1])
            for part, rows in zip(others, g_others, strict=True):
                part.weight.add_matmul_transposed(rows, grad_rows)
            del g_first, g_others
        x_rows = None if x is None else x.reshape(-1, x.shape[-1])
        if ctx.shared is not None:
            return grad_x, None, None, *ctx.shared.add_backward(x_rows, g_rows, grad_rows, tuple(kept))
        grads: list[Tensor | None] = []
        counts = iter(ctx.counts)
        for part, of_uses in zip(ctx.parts, g_uses, strict=True):
            for use, rows in zip(part.uses, of_uses, strict=False):
                count = next(counts)
                own, kept = tuple(kept[:count]), kept[count:]
                grads += use.update.add_backward(x_rows, rows, grad_rows, use.scale, own)
        return grad_x, None, None, *grads


def _rescales(part: _Part) -> bool:
    return any(use.update.rescales_output for use in part.uses)


def _gradients_of_uses(part: _Part, g: Tensor) -> list[Tensor]:
    """The gradients of y [tokens, out] behind each update, and of the frozen product; the same tensor where they are
    alike."""
    found = [g]
    for use in reversed(part.uses):
        found.append(use.update.change_gradient(found[-1], use.scale) if use.update.rescales_output else found[-1])
    return [*reversed(found[:-1]), found[-1]]


_apply: Callable[..., tuple[Tensor, ...]] = _AdaptedProduct.apply


def _frozen_product(x: Tensor, part: _Part, *, skip: bool) -> Tensor:
    if skip:
        return x.new_empty((*x.shape[:-1], part.weight.shape[0]))
    y = part.weight.matmul(x)
    if part.bias is not None:
        # One that was put in its place is float32.
        y += part.bias.to(y.dtype)
    return y


def _shared(parts: Sequence[_Part]) -> SharedUpdate | None:
    """The one update of several linears; None where there is one linear, or updates differ in number or kind."""
    if len(parts) < 2 or any(len(part.uses) != 1 for part in parts):
        return None
    uses = [part.uses[0] for part in parts]
    if any(type(use.update) is not type(uses[0].update) for use in uses):
        return None
    return uses[0].update.together(uses)
