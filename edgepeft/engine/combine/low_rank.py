"""Arithmetic on updates that are kept as a product B·A of small rank; the dense matrix [out, in] is never formed.

With B = Q_b R_b and Aᵀ = Q_a R_a (QR), B·A = Q_b (R_b R_aᵀ) Q_aᵀ: its singular values are those of the small core
R_b R_aᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """An update B·A."""

    A: Tensor
    """[rank, in], float64."""
    B: Tensor
    """[out, rank], float64."""

    @property
    def rank(self) -> int:
        """Rows of A."""
        return int(self.A.shape[0])


class Truncated(NamedTuple):
    """An update cut to a smaller rank."""

    factors: Factors
    energy: float
    """Sum of all squared singular values, the squared Frobenius norm."""
    kept: float
    """Sum of those that were kept."""


def concatenate(terms: Sequence[tuple[Factors, float]]) -> Factors:
    """Σ c · B·A without an error but rounding: ranks side by side.

    √|c| goes into both factors, so that neither becomes small beside the other, and the sign into B.

    Args:
        terms: each update and its factor c; all of one [out, in].
    """
    rows, columns = [], []
    for (A, B), factor in terms:
        root = math.sqrt(abs(factor))
        rows.append(A * root)
        columns.append(B * math.copysign(root, factor))
    return Factors(torch.cat(rows), torch.cat(columns, dim=1))


def add_factors(terms: Sequence[tuple[Factors, float]], shares: Sequence[float] | None = None) -> Factors:
    """A and B added one by one; that is not the sum of the updates: (B₁+B₂)(A₁+A₂) has the products B₁A₂ and B₂A₁ too.

    Without `shares`, √|c| goes into both factors and the sign into A, as PEFT's `linear` does it. With them, factors
    are averaged as federated averaging does it (McMahan et al. 2017, arXiv 1602.05629): A = Σ p √|s| A and
    B = Σ p √|s| B, where s = c / p is the adapter's own scale.

    Args:
        terms: each update and its factor c; all of one [out, in] and one rank.
        shares: p of each adapter, above 0.

    Raises:
        ValueError: the ranks differ.
    """
    ranks = {factors.rank for factors, _ in terms}
    if len(ranks) > 1:
        raise ValueError(f"factors of the ranks {sorted(ranks)} cannot be added")
    A, B = torch.zeros_like(terms[0][0].A), torch.zeros_like(terms[0][0].B)
    for number, (factors, factor) in enumerate(terms):
        share = 1.0 if shares is None else shares[number]
        root = share * math.sqrt(abs(factor / share))
        A += factors.A * math.copysign(root, factor)
        B += factors.B * root
    return Factors(A, B)


def energy_of(factors: Factors) -> float:
    """‖B·A‖², the squared Frobenius norm: ⟨BᵀB, AAᵀ⟩."""
    return max(0.0, float(((factors.B.t() @ factors.B) * (factors.A @ factors.A.t())).sum()))


def energy_between(first: Factors, second: Factors) -> float:
    """‖B₁A₁ − B₂A₂‖²; differences below 1e-8 of the norms drown in rounding."""
    return energy_of(concatenate([(first, 1.0), (second, -1.0)]))


def truncate(factors: Factors, rank: int) -> Truncated:
    """The update of at most `rank` that is nearest in the Frobenius norm (Eckart & Young 1936).

    Each singular value's root goes into both factors.

    Args:
        factors: of any rank, also one above the sides of the matrix.
        rank: of the result, or less where the matrix has no more.
    """
    outer, core, inner = _core(factors)
    U, values, Vh = torch.linalg.svd(core, full_matrices=False)
    roots = values[:rank].sqrt()
    kept = Factors((Vh[:rank] * roots[:, None]) @ inner.t(), outer @ (U[:, :rank] * roots))
    return Truncated(kept, float(values.square().sum()), float(values[:rank].square().sum()))


def _core(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """Q_b [out, k], R_b R_aᵀ [k, l] and Q_a [in, l]."""
    outer, outer_core = torch.linalg.qr(factors.B)
    inner, inner_core = torch.linalg.qr(factors.A.t())
    return outer, outer_core @ inner_core.t(), inner
