"""DoRA: LoRA whose sum with the frozen weight gives directions only, each row with a trained length.

Liu et al. 2024, *DoRA: Weight-Decomposed Low-Rank Adaptation* (arXiv 2402.09353). Row o of the weight becomes
`m_o (W_o + s B_o A) / n_o` with n_o the length of that sum, a constant in backward (section 4.3 there). No sum of
matrices is ever formed: `n_o² = |W_o|² + s B_o · (2 A W_oᵀ + s A Aᵀ B_oᵀ)`, of which the first term never changes. The
lengths n are formed once after A or B have changed, so once in an optimizer step, and not again in a chat.

A strength t lies between base and trained adapter in both respects: lengths `|W| + t (m - |W|)`, directions
`W + t s B A`. 0 is the base, 1 the adapter as trained.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgepeft.engine.kernels import one_of
from edgepeft.engine.methods.dropout import current_samples
from edgepeft.engine.model.frozen import FrozenWeight
from edgepeft.engine.model.linear import AdaptedLinear, LinearUpdate
from edgepeft.memory.chunks import CPU_CHUNK

if TYPE_CHECKING:
    from edgepeft.engine.methods.lora import LoraUpdate

_LEAST_SQUARE = 1e-30
"""A row of zeros has no direction; its length is taken for a little more than nothing."""


class DoraUpdate(LinearUpdate):
    """LoRA and the length of each row, for one linear.

    Args:
        lora: A, B and their scale.
        linear: the one that is changed.
        squares: of the lengths of its weight's rows, float32 [out].
        magnitude: the trained lengths m, float32 [out]; None starts with those of the weight.
    """

    keeps_input = True
    alters = ("weight",)

    def __init__(
        self, lora: LoraUpdate, linear: AdaptedLinear, squares: Tensor, magnitude: nn.Parameter | None = None
    ) -> None:
        self._lora = lora
        self.A, self.B, self.factor = lora.A, lora.B, lora.factor
        self._weight, self._bias = linear.weight_source, linear.bias
        self._squares = squares
        self.magnitude = nn.Parameter(squares.sqrt()) if magnitude is None else magnitude
        self._lengths = torch.empty_like(squares)
        self._formed_for: tuple[int, int, float] | None = None

    @property
    def rescales_output(self) -> bool:
        """Not with dropout: then the lengths multiply a product of their own, of the input that is left."""
        return not self._drops

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """A, B and m under the names that PEFT's files use."""
        return self._lora.named_tensors() | {"lora_magnitude_vector": self.magnitude}

    def tensors(self) -> tuple[Tensor, ...]:
        """A, B and m."""
        return self.A, self.B, self.magnitude

    def add_forward(self, x: Tensor, y: Tensor, scale: float) -> tuple[Tensor, ...]:
        """y = m (x Wᵀ + s x Aᵀ Bᵀ) / n + bias; keeps x Aᵀ and what m / n multiplies, of [tokens, rank] and y's shape.

        With dropout, as in PEFT, y stays and `(m / n - 1) x' Wᵀ + s (m / n) x' Aᵀ Bᵀ` is added to it, for the x' that
        is left of x.
        """
        factor = self.factor * scale
        # By what is multiplied less 1, so that rounding it does not round what is multiplied.
        excess = self._excess(scale, y.dtype).to(y.dtype)
        samples = current_samples() if self._lora.dropout else None
        if samples is not None:
            x = x * self._lora.mask(samples, x)
        inner = x @ self.A.to(x.dtype).t()
        outer = self.B.to(x.dtype).t()
        y.addmm_(inner, outer, alpha=factor)
        if samples is None:
            whole = y.clone()
            y.addcmul_(whole, excess)
            if self._bias is not None:
                y.sub_(excess * self._bias)
        else:
            whole = self._weight.matmul(x).addmm_(inner, outer, alpha=factor)
            y.addcmul_(whole, excess)
        return inner, whole

    def change_gradient(self, g: Tensor, scale: float) -> Tensor:
        """g m / n."""
        return torch.addcmul(g, g, self._excess(scale, g.dtype).to(g.dtype))

    def add_backward(
        self, x: Tensor | None, g: Tensor, grad_x: Tensor | None, scale: float, kept: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """LoRA's for g m / n, and dm = Σ g ⊙ (x Wᵀ + s x Aᵀ Bᵀ) / n over the tokens."""
        inner, whole = kept
        factor, excess = self.factor * scale, self._excess(scale, g.dtype)
        samples = current_samples() if self._lora.dropout else None
        grad_m = None if x is None else self._gradient_of_lengths(g, whole, scale, dropping=samples is not None)
        scaled = torch.addcmul(self.B, self.B, excess.unsqueeze(1)).to(g.dtype)
        g_inner = (g @ scaled).mul_(factor)
        del scaled
        mask = None if samples is None else self._lora.mask(samples, g, self.A.shape[1])
        if grad_x is not None:
            if mask is None:
                grad_x.addmm_(g_inner, self.A.to(g.dtype))
            else:
                part = self._weight.matmul_transposed(g * excess.to(g.dtype))
                part.addmm_(g_inner, self.A.to(g.dtype))
                grad_x += part.mul_(mask)
                del part
        if x is None:
            return None, None, None
        seen = x if mask is None else x * mask
        grad_B = (g.t() @ inner).to(self.B.dtype).mul_((excess + 1).mul_(factor).unsqueeze(1))
        return (g_inner.t() @ seen).to(self.A.dtype), grad_B, grad_m

    def merge_into(self, parameter: str, values: Tensor, rows: slice) -> None:
        """Rows of W + s B A, each brought to its length m; see `Mergeable`."""
        self._lora.merge_into(parameter, values, rows)
        lengths = torch.linalg.vector_norm(values, dim=1).clamp_(min=math.sqrt(_LEAST_SQUARE))
        values.mul_((self.magnitude.detach()[rows] / lengths).unsqueeze(1))

    @property
    def _drops(self) -> bool:
        return self._lora.dropout > 0 and current_samples() is not None

    def _gradient_of_lengths(self, g: Tensor, whole: Tensor, scale: float, *, dropping: bool) -> Tensor:
        found = (g * whole).sum(0).to(self.magnitude.dtype)
        if self._bias is not None and not dropping:
            # The bias lies in what was kept and is not multiplied.
            found -= g.sum(0) * self._bias
        return found.mul_(scale).div_(self._lengths)

    def _excess(self, scale: float, dtype: torch.dtype) -> Tensor:
        """m / n - 1 for a strength, float32 [out]; `dtype` is that of products."""
        self._form_lengths(scale, dtype)
        wanted = self.magnitude.detach()
        if scale != 1:
            wanted = torch.lerp(self._squares.sqrt(), wanted, scale)
        return (wanted / self._lengths).sub_(1)

    def _form_lengths(self, scale: float, dtype: torch.dtype) -> None:
        factor = self.factor * scale
        now = (self.A._version, self.B._version, factor)
        if now == self._formed_for:
            return
        # In chat they may be in the compute dtype.
        A, B = self.A.detach().float(), self.B.detach().float()
        # [rank, out]
        across = self._weight.matmul(A.to(dtype)).to(B.dtype)
        across.mul_(2).addmm_(A @ A.t(), B.t(), alpha=factor)
        squares = across.mul_(B.t()).sum(0).mul_(factor).add_(self._squares).clamp_(min=_LEAST_SQUARE)
        torch.sqrt(squares, out=self._lengths)
        self._formed_for = now


def squared_lengths(weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
    """|W_o|² of each row, float32 [out], of the values that products in `dtype` see; one dense matrix at a time."""
    dense = weight.materialize(torch.empty(weight.shape, dtype=dtype, device=weight.device))
    out_features, in_features = weight.shape
    found = torch.empty(out_features, dtype=torch.float32, device=weight.device)
    step = max(1, CPU_CHUNK // in_features)
    for start in one_of(range(0, out_features, step)):
        rows = dense[start : start + step].float()
        torch.linalg.vecdot(rows, rows, out=found[start : start + step])
    return found
