"""Norms, gated MLPs and projections of one input in one operation each: fewer passes over memory, fewer tensors kept.

transformers computes a norm in eight operations with float32 copies of its whole input, and keeps several of them for
backward. Here the input and one number a row are kept; float32 exists for some rows at a time on the CPU. The same
values come out: sums and the root are float32, and rounding happens where the model's own code rounds.

Only classes whose code is known are changed, each by an attribute of the instance; everything else runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from edgepeft.engine.kernels import one_of, target_of
from edgepeft.engine.model.activation import Activation, act, act_backward
from edgepeft.engine.model.linear import AdaptedLinear, SharedInput
from edgepeft.memory.chunks import ELEMENTWISE_CHUNK

Gain = Literal["cast, then gain", "gain, then cast"]


class NormStyle(NamedTuple):
    """How a norm applies its gain."""

    gain: Gain
    """Whether what was normalised is rounded to the compute dtype before it meets the gain, or after."""
    offset: float = 0.0
    """Added to the stored weight (Gemma keeps its gain less 1)."""


_LLAMA_LIKE = ("Llama", "Mistral", "Ministral", "Ministral3", "Qwen2", "Qwen3", "SmolLM3", "Granite")
_MIXTURES = ("Mixtral", "Qwen2Moe", "Qwen3Moe")
_OLMO, _GEMMA = ("Olmo2", "Olmo3"), ("Gemma", "Gemma2", "Gemma3")

NORMS: dict[str, NormStyle] = {
    **{f"{family}RMSNorm": NormStyle("cast, then gain") for family in (*_LLAMA_LIKE, *_MIXTURES, "Phi3")},
    **{f"{family}RMSNorm": NormStyle("gain, then cast") for family in _OLMO},
    **{f"{family}RMSNorm": NormStyle("gain, then cast", 1.0) for family in _GEMMA},
}
"""transformers' classes (5.23) and what they compute: root mean square norms, arXiv 1910.07467."""
GATED_MLPS = frozenset(f"{family}MLP" for family in (*_LLAMA_LIKE, "Qwen2Moe", "Qwen3Moe", *_OLMO, *_GEMMA))
"""Classes that compute down(act(gate(x)) · up(x)) and nothing else (SwiGLU, arXiv 2002.05202)."""
ATTENTIONS = frozenset(f"{family}Attention" for family in (*_LLAMA_LIKE, *_MIXTURES, *_OLMO, *_GEMMA))
"""Classes that project one tensor to queries, keys and values, in this order."""
ENDS_WITH_MLP = frozenset(f"{family}DecoderLayer" for family in (*_LLAMA_LIKE, "Phi3", "Gemma"))
"""Decoder layers whose output is a sum of the residual and the MLP's output: nothing keeps the latter."""


def fuse(model: nn.Module) -> None:
    """Lets the known norms and MLPs of a model, whose linears are `AdaptedLinear`s, run in one operation each."""
    for module in model.modules():
        kind = type(module).__name__
        if kind in NORMS:
            module.__dict__["forward"] = partial(_norm, module, NORMS[kind])
        elif kind in ATTENTIONS:
            _share_input(module, "q_proj", "k_proj", "v_proj")
        elif kind in GATED_MLPS and (activation := _activation(getattr(module, "act_fn", None))) is not None:
            module.__dict__["forward"] = partial(_mlp, module, activation)
            _share_input(module, "gate_proj", "up_proj")
        elif kind in ENDS_WITH_MLP:
            last = getattr(getattr(module, "mlp", None), "down_proj", None)
            if isinstance(last, AdaptedLinear):
                last.ends_layer = True


def _share_input(parent: nn.Module, *names: str) -> None:
    members = [child for name in names if isinstance(child := getattr(parent, name, None), AdaptedLinear)]
    if len(members) == len(names):
        SharedInput(members)


def _activation(module: Any) -> Activation | None:
    """The activation that a module is; None for one that is not known here."""
    kind = type(module).__name__
    if kind in ("SiLU", "SiLUActivation"):
        return "silu", "none"
    if kind in ("PytorchGELUTanh", "GELUTanh"):
        return "gelu", "tanh"
    if isinstance(module, nn.GELU):
        return "gelu", str(module.approximate)
    return None


def _norm(module: Any, style: NormStyle, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """The norm with its own weight, or with another one in float32, which then gets a gradient."""
    epsilon = module.eps if hasattr(module, "eps") else module.variance_epsilon
    apply: Any = _RmsNorm.apply
    out: Tensor = apply(x, module.weight if weight is None else weight, epsilon, style)
    return out


def _mlp(module: Any, activation: Activation, x: Tensor) -> Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    apply: Any = _Gated.apply
    inner = apply(gate, up, activation)
    del gate, up
    out: Tensor = module.down_proj(inner)
    return out


def _parts(x: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """Cuts into pieces that fit a cache; on a card one piece, since there more of them are only more launches.

    Each piece is a function that narrows a tensor like x, or one whose last dimension is 1.
    """
    dim = max(range(x.dim() - 1), key=lambda dim: x.shape[dim])
    count = int(x.shape[dim])
    step = count
    if target_of(x.device).kind == "cpu":
        step = max(1, ELEMENTWISE_CHUNK * count // max(1, x.numel()))
    for begin in one_of(range(0, count, step)):
        yield partial(torch.narrow, dim=dim, start=begin, length=min(step, count - begin))


class _RmsNorm(torch.autograd.Function):
    """x / √(mean(x²) + ε) times a gain, over the last dimension; keeps x and the root's inverse of each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, style: NormStyle) -> Tensor:
        out = torch.empty_like(x)
        root = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
        gain = _gain(weight, style, x.dtype)
        for part in _parts(x):
            wide = part(x).float()
            scale = part(root).copy_(wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_())
            if style.gain == "cast, then gain":
                torch.mul(part(out).copy_(wide * scale), gain, out=part(out))
            else:
                part(out).copy_((wide * scale).mul_(gain))
            del wide, scale
        ctx.save_for_backward(x, root, weight)
        ctx.style = style
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, root, weight = ctx.saved_tensors
        gain = _gain(weight, ctx.style, x.dtype)
        grad = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for part in _parts(x):
            scaled = part(x).float() * part(root)
            # In float32, as the sum over the row is.
            through = part(g).float()
            if grad_weight is not None:
                grad_weight += (through * scaled).flatten(0, -2).sum(0)
            if grad is None:
                continue
            through = through * gain
            along = (through * scaled).mean(-1, keepdim=True)
            part(grad).copy_(through.sub_(scaled.mul_(along)).mul_(part(root)))
            del scaled, through, along
        return grad, grad_weight, None, None


def _gain(weight: Tensor, style: NormStyle, dtype: torch.dtype) -> Tensor:
    """What normalised rows are multiplied with: in the rows' dtype where they were rounded to it, else in float32."""
    if style.gain == "cast, then gain":
        return weight.to(dtype)
    return weight.float() + style.offset


class _Gated(torch.autograd.Function):
    """act(gate) · up; keeps both, not the activation's result."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        out = torch.empty_like(gate)
        for part in _parts(gate):
            act(part(gate), activation, part(out)).mul_(part(up))
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        for part in _parts(gate):
            act(part(gate), ctx.activation, part(grad_up)).mul_(part(g))
            slope = torch.mul(part(g), part(up), out=part(grad_gate))
            act_backward(slope, part(gate), ctx.activation)
        return grad_gate, grad_up, None
