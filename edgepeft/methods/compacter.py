"""Compacter: bottleneck adapters whose matrices are sums of Kronecker products, most of them shared by all layers.

Karimi Mahabadi et al. 2021, *Compacter: Efficient Low-Rank Hypercomplex Adapter Layers* (arXiv 2106.04647). A matrix
of shape [in, out] is `Σᵢ Aᵢ ⊗ (sᵢ tᵢ)` over i < n, with the rules Aᵢ of shape [n, n] shared by every map of every layer
(the parameterised hypercomplex product of Zhang et al. 2021, arXiv 2102.08597), sᵢ of [in / n, rank] and tᵢ of
[rank, out / n]. The full matrix is never formed. Adapters stand after attention and after the MLP, as Houlsby's do.
The t of the maps back up start at zero, so training starts from the base.
"""

from __future__ import annotations

from typing import Any

import msgspec

from edgepeft.errors import UsageError
from edgepeft.methods.bottleneck import Activation, check_reduction, check_scale
from edgepeft.methods.terms import FLOAT32, Branch, BranchTerms, Method, Trained
from edgepeft.models.shape import ModelShape

BRANCHES: tuple[Branch, ...] = ("attention", "mlp")


class CompacterConfig(msgspec.Struct, frozen=True, tag="compacter", forbid_unknown_fields=True):
    """What decides a Compacter."""

    reduction: float = 16.0
    """The residual stream's width over the adapter's; 2 to 64 are usual."""
    products: int = 4
    """Kronecker products in a sum, n; it divides both widths. More of them mean smaller factors."""
    rank: int = 1
    """Of each factor s t."""
    activation: Activation = "gelu"
    """The non-linearity: relu, gelu or silu."""
    scale: float = 1.0
    """What is added is multiplied by this."""

    def __post_init__(self) -> None:
        check_reduction(self.reduction)
        check_scale(self.scale)
        if self.products < 1:
            raise UsageError(f"{self.products} products are not possible", where="products", hint="Use 2, 4 or 8")
        if self.rank < 1:
            raise UsageError(f"a rank of {self.rank} is not possible", where="rank", hint="Use 1 to 8")

    def width(self, hidden: int) -> int:
        """Entries between down and up, a multiple of `products`.

        Raises:
            UsageError: the residual stream's width is none.
        """
        if hidden % self.products:
            raise UsageError(
                f"{self.products} products do not divide the model's width of {hidden}",
                where="products",
                hint="Use 2, 4 or 8",
            )
        return self.products * max(1, round(hidden / self.reduction / self.products))


class Compacter(Method):
    """See the module."""

    paper = "arXiv 2106.04647"
    adds = "a small network of shared Kronecker products behind attention and MLP"
    merges = False

    def trained(self, config: CompacterConfig, shape: ModelShape) -> Trained:
        """s, t and a bias of each map, and the rules once."""
        n, rank, hidden, width = config.products, config.rank, shape.hidden, config.width(shape.hidden)
        # Of n factors with in / n or out / n rows each, n cancels.
        adapter = (rank * hidden, rank * width, width, rank * width, rank * hidden, hidden)
        return Trained(len(BRANCHES) * adapter, (n * n * n,))

    def branch_terms(
        self, config: Any, shape: ModelShape, branch: Branch, tokens: int, compute_bytes: int
    ) -> BranchTerms | None:
        """What goes into f is kept; the products between s, rules and t, of n²·rank entries a token, come and go."""
        c, n, hidden, width = compute_bytes, config.products, shape.hidden, config.width(shape.hidden)
        inner, outer, between = c * tokens * width, c * tokens * hidden, c * tokens * n * n * config.rank
        scaled = 0 if config.scale == 1 else outer
        up = FLOAT32 * (config.rank * (hidden + width) + hidden + n**3)
        return BranchTerms(
            parameters=2 * config.rank * (hidden + width) + hidden + width,
            reads="output",
            kept_bytes=inner,
            forward_bytes=inner + between,
            backward_bytes=max(scaled + inner + 4 * between + up, scaled + up + inner + 2 * between),
            gradient_bytes=inner + 2 * between,
        )
