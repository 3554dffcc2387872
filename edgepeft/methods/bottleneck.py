"""Bottleneck adapters: a small two-layer network behind or beside the branches of each decoder layer.

Houlsby et al. 2019, *Parameter-Efficient Transfer Learning for NLP* (arXiv 1902.00751): after attention and after the
MLP, before the residual is added. Pfeiffer et al. 2021, *AdapterFusion* (arXiv 2005.00247): after the MLP alone, for
half of the parameters. He et al. 2022, *Towards a Unified View of Parameter-Efficient Transfer Learning* (arXiv
2110.04366): beside the MLP, reading its input, with a scale. Each computes `s (f(h Dᵀ + d) Uᵀ + u)`, D of shape
[width, hidden] and U of [hidden, width]; U starts at zero, so training starts from the base. The non-linearity stands
between, so unlike LoRA it cannot be folded into the base.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec

from edgepeft.errors import UsageError
from edgepeft.methods.terms import FLOAT32, Branch, BranchTerms, Method, Trained
from edgepeft.models.shape import ModelShape

Placement = Literal["houlsby", "pfeiffer", "parallel"]
Activation = Literal["relu", "gelu", "silu"]
_BRANCHES: dict[Placement, tuple[Branch, ...]] = {
    "houlsby": ("attention", "mlp"),
    "pfeiffer": ("mlp",),
    "parallel": ("mlp",),
}


class BottleneckConfig(msgspec.Struct, frozen=True, tag="bottleneck", forbid_unknown_fields=True):
    """What decides a bottleneck adapter."""

    placement: Placement = "houlsby"
    """`houlsby` after attention and MLP, `pfeiffer` after the MLP, `parallel` beside the MLP."""
    reduction: float = 16.0
    """The residual stream's width over the adapter's; 2 to 64 are usual."""
    activation: Activation = "gelu"
    """The non-linearity: relu, gelu or silu."""
    scale: float = 1.0
    """What is added is multiplied by this; the parallel form was published with 4."""

    def __post_init__(self) -> None:
        check_reduction(self.reduction)
        check_scale(self.scale)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """Where the adapters are."""
        return _BRANCHES[self.placement]

    def width(self, hidden: int) -> int:
        """Entries between down and up."""
        return max(1, round(hidden / self.reduction))


def check_reduction(value: float) -> None:
    """Raises UsageError for a reduction factor that makes no bottleneck."""
    if not math.isfinite(value) or value < 1:
        raise UsageError(f"a reduction of {value:g} is not possible", where="reduction", hint="Use 2 to 64")


def check_scale(value: float) -> None:
    """Raises UsageError for a scale that makes nothing, or nonsense."""
    if not math.isfinite(value) or value == 0:
        raise UsageError(f"a scale of {value:g} is not possible", where="scale", hint="Use 1, or 4 beside the MLP")


class Bottleneck(Method):
    """See the module."""

    paper = "arXiv 1902.00751"
    adds = "a small network behind or beside attention and MLP"
    merges = False

    def trained(self, config: BottleneckConfig, shape: ModelShape) -> Trained:
        """D, d, U and u of each adapter."""
        width, hidden = config.width(shape.hidden), shape.hidden
        return Trained(len(config.branches) * (width * hidden, width, hidden * width, hidden))

    def branch_terms(
        self, config: Any, shape: ModelShape, branch: Branch, tokens: int, compute_bytes: int
    ) -> BranchTerms | None:
        """What goes into f is kept; its result is formed again. D and U exist in the compute dtype while multiplied."""
        if branch not in config.branches:
            return None
        c, hidden, width = compute_bytes, shape.hidden, config.width(shape.hidden)
        matrix, inner, outer = width * hidden, c * tokens * width, c * tokens * hidden
        # Where products run in float32, neither parameters nor gradients are copied.
        low, fresh = (0, FLOAT32) if c == FLOAT32 else (c, c + FLOAT32)
        scaled = 0 if config.scale == 1 else outer
        up = FLOAT32 * (matrix + hidden)
        return BranchTerms(
            parameters=2 * matrix + width + hidden,
            reads="input" if config.placement == "parallel" else "output",
            kept_bytes=inner,
            forward_bytes=inner + low * matrix,
            backward_bytes=max(
                # f(…) beside U's fresh gradient; then the gradient that went up, formed by U.
                scaled + inner + fresh * matrix,
                scaled + up + inner + low * matrix,
                up + inner + fresh * matrix,
            ),
            gradient_bytes=inner + low * matrix,
        )
