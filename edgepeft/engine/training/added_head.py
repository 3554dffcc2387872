"""What adapters add to the output head, for a chunk of rows at a time: `logits += s (x Aᵀ) Bᵀ`, forward and backward.

Both happen while the chunk's logits exist, so neither the product B · A nor the logits of all rows are ever formed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgepeft.engine.kernels import one_of
from edgepeft.engine.model.tables import LowRank
from edgepeft.memory.chunks import TABLE_ROWS


class Product:
    """One adapter's part in the loss of a micro-batch.

    Args:
        low: what is added.
        hidden: [tokens, hidden] of the whole micro-batch, in the compute dtype.
        trains: whether A and B get gradients.
    """

    def __init__(self, low: LowRank, hidden: Tensor, trains: bool) -> None:
        shapes = [low.A, low.B] if trains else []
        self.gradients: list[Tensor] = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in shapes]
        """Of A and of B so far, float32; none where they are not trained."""
        self._A, self._B = low.A.detach().to(hidden.dtype), low.B.detach().to(hidden.dtype)
        self._factor = low.factor
        self._mask = None if low.mask is None else low.mask(hidden)
        self._inner: Tensor | None = None
        self._mask_of_chunk: Tensor | None = None

    def add_forward(self, picked: Tensor, rows: Tensor, logits: Tensor) -> None:
        """Adds to the logits [filled, vocabulary] of a chunk, in place.

        Args:
            picked: [filled, hidden], the chunk's hidden states; zeros behind the last of `rows`.
            rows: int64 [rows], their places in the micro-batch.
            logits: of the head's matrix alone.
        """
        if self._mask is not None:
            self._mask_of_chunk = torch.zeros_like(picked)
            torch.index_select(self._mask, 0, rows, out=self._mask_of_chunk[: rows.shape[0]])
        self._inner = (_seen(picked, self._mask_of_chunk) @ self._A.t()).mul_(self._factor)
        logits.addmm_(self._inner, self._B.t())

    def add_backward(self, picked: Tensor, g: Tensor, gradient: Tensor | None) -> None:
        """Adds to the gradients of A, B and, where there is one, of the chunk's hidden states, in place.

        Args:
            picked: as it was in `add_forward`.
            g: [filled, vocabulary], the gradient of the logits.
            gradient: [filled, hidden].
        """
        inner, mask = self._inner, self._mask_of_chunk
        self._inner = self._mask_of_chunk = None
        if gradient is None and not self.gradients:
            return
        assert inner is not None
        g_inner = (g @ self._B).mul_(self._factor)
        if gradient is not None and mask is not None:
            gradient += (g_inner @ self._A).mul_(mask)
        elif gradient is not None:
            gradient.addmm_(g_inner, self._A)
        if self.gradients:
            add_product(self.gradients[0], g_inner, _seen(picked, mask))
            add_product(self.gradients[1], g, inner)


def _seen(picked: Tensor, mask: Tensor | None) -> Tensor:
    return picked if mask is None else picked * mask


def add_product(total: Tensor, g: Tensor, x: Tensor) -> None:
    """`total += gᵀ x`, float32 [out, in], for [rows, out] and [rows, in]; without a second matrix of that size."""
    if g.dtype == total.dtype:
        total.addmm_(g.t(), x)
        return
    for begin in one_of(range(0, total.shape[0], TABLE_ROWS)):
        block = slice(begin, begin + TABLE_ROWS)
        total[block].add_(g[:, block].t() @ x)
