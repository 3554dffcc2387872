"""Non-linearities and their slopes, into memory that is there already."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Activation = tuple[Literal["relu", "silu", "gelu"], str]
"""Its name, and for gelu whether it is approximated: `tanh` or `none`."""


def act(x: Tensor, activation: Activation, out: Tensor) -> Tensor:
    """The activation's result, in `out`, which is of x's shape and dtype."""
    name, approximate = activation
    if name == "relu":
        return torch.clamp_min(x, 0, out=out)
    if name == "silu":
        torch.ops.aten.silu.out(x, out=out)
    else:
        torch.ops.aten.gelu.out(x, approximate=approximate, out=out)
    return out


def act_backward(g: Tensor, x: Tensor, activation: Activation) -> None:
    """Turns the gradient of the activation's result into that of its input x, in place."""
    name, approximate = activation
    if name == "relu":
        torch.ops.aten.threshold_backward.grad_input(g, x, 0, grad_input=g)
    elif name == "silu":
        torch.ops.aten.silu_backward.grad_input(g, x, grad_input=g)
    else:
        torch.ops.aten.gelu_backward.grad_input(g, x, approximate=approximate, grad_input=g)
