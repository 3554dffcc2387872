"""Merging updates entry by entry: TIES and DARE on the matrices ΔW, then back to a small rank.

PEFT's `ties` and `dare_linear` treat A and B as if each were a task vector of its own. But the papers speak of the
change of the weights, and neither trimming nor a vote on signs passes through a product: the sign of an entry of B
says nothing about the sign of an entry of B·A. Here both act on ΔW = s·B·A, one module at a time. PEFT's `ties_svd` and
`dare_linear_svd` do so as well; its TIES lets updates vote before they are weighed, here weights come first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from edgepeft.engine.combine.low_rank import Factors, Truncated

EXACT_SIDE = 256
"""Up to this smaller side of a matrix, singular vectors are exact; above, that takes several times as long."""
_OVERSAMPLING = 16
_ITERATIONS = 8


def trim(update: Tensor, density: float) -> Tensor:
    """The entries of largest magnitude, a share `density` of them and at least one; the others become 0.

    The TIES paper trims the vector of all weights at once; here each module keeps the same share.

    Args:
        update: [out, in].
        density: in (0, 1].
    """
    count = max(1, round(density * update.numel()))
    if count >= update.numel():
        return update
    magnitudes = update.abs()
    # numpy's selection is several times as fast as torch's.
    smallest = update.numel() - count
    threshold = float(np.partition(magnitudes.numpy().reshape(-1), smallest)[smallest])
    return torch.where(magnitudes >= threshold, update, 0.0)


def elect_and_average(updates: Sequence[Tensor]) -> Tensor:
    """Sign election and disjoint mean of TIES (Yadav et al. 2023, arXiv 2306.01708).

    Each entry takes the sign of the sum; the result is the mean of those updates that have it there, zeros left out.
    Weights are in the updates already: with all of them 1 this is the paper with λ = 1.

    Args:
        updates: weighted and trimmed, each [out, in].
    """
    total = torch.zeros_like(updates[0])
    for update in updates:
        total += update
    elected = total.sign()
    agreeing, count = torch.zeros_like(total), torch.zeros_like(total)
    for update in updates:
        agrees = (update.sign() == elected) & (update != 0)
        agreeing += torch.where(agrees, update, 0.0)
        count += agrees
    return agreeing / count.clamp_(min=1)


def drop(update: Tensor, density: float, seed: int, part: int, module: str) -> Tensor:
    """Drop and rescale of DARE (Yu et al. 2023, arXiv 2311.03099): an entry stays with probability `density`, times
    1 / `density`, so that the expected value is the update.

    Which ones stay depends on seed, part and module alone, not on the order in which modules are visited.
    """
    if density >= 1:
        return update
    digest = hashlib.blake2b(f"{seed}\x1f{part}\x1f{module}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return update * torch.empty_like(update).bernoulli_(density, generator=generator).div_(density)


def truncate_dense(matrix: Tensor, rank: int) -> Truncated:
    """A product of `rank` that is as near to a dense matrix as one can be, in the Frobenius norm.

    Up to `EXACT_SIDE` by the eigenvectors of the smaller Gram matrix in float64. Above, by subspace iteration from a
    random start (Halko et al. 2011, arXiv 0909.4061), fixed by a seed; what it keeps is measured. Of updates that were
    trimmed or dropped it kept as much as the exact one to 1e-6, of pure noise a thousandth less.

    Args:
        matrix: [out, in], float32.
        rank: up to the smaller side.
    """
    energy = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    turned = matrix.shape[0] > matrix.shape[1]
    low = matrix.t() if turned else matrix
    basis = _exact_basis(low, rank) if low.shape[0] <= EXACT_SIDE else _iterated_basis(low, rank)
    # The projection onto the basis, whatever the basis is; its own singular values balance the factors.
    projected = (basis.t() @ low.to(basis.dtype)).double()
    basis = basis.double()
    U, values, Vh = torch.linalg.svd(projected, full_matrices=False)
    roots = values[:rank].sqrt()
    left, right = basis @ (U[:, :rank] * roots), Vh[:rank] * roots[:, None]
    factors = Factors(left.t().contiguous(), right.t().contiguous()) if turned else Factors(right, left)
    return Truncated(factors, energy, min(energy, float(values[:rank].square().sum())))


def _exact_basis(matrix: Tensor, rank: int) -> Tensor:
    """[rows, rank], float64: the leading left singular vectors of a matrix that has no more rows than columns."""
    wide = matrix.double()
    vectors: Tensor = torch.linalg.eigh(wide @ wide.t()).eigenvectors
    return vectors[:, -rank:]


def _iterated_basis(matrix: Tensor, rank: int) -> Tensor:
    """[rows, rank + oversampling] in float32, nearly; so large a matrix is not copied into float64."""
    generator = torch.Generator().manual_seed(0)
    width = min(rank + _OVERSAMPLING, matrix.shape[0])
    basis: Tensor = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], width, generator=generator)).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis).Q).Q
    return basis
