"""A matrix that takes the place of a frozen one in part: what lies between the two, of which only products exist."""

from __future__ import annotations

import torch
from torch import Tensor

from edgepeft.engine.model.frozen import FrozenWeight
from edgepeft.memory.breakdown import Category


class BetweenWeight:
    """W + s (V - W), see `FrozenWeight`; each product is made of one with W and one with V, and the sum is not formed.

    Args:
        weight: W.
        other: V.
        share: s.
    """

    def __init__(self, weight: FrozenWeight, other: FrozenWeight, share: float) -> None:
        self.shape = weight.shape
        self.device = weight.device
        self._weight = weight
        self._other = other
        self._share = share

    def matmul(self, x: Tensor) -> Tensor:
        """`x @ W.T`."""
        return self._weight.matmul(x).lerp_(self._other.matmul(x), self._share)

    def matmul_transposed(self, g: Tensor) -> Tensor:
        """`g @ W`."""
        return self._weight.matmul_transposed(g).lerp_(self._other.matmul_transposed(g), self._share)

    def add_matmul_transposed(self, g: Tensor, out: Tensor) -> None:
        """`out += g @ W`."""
        self._weight.add_matmul_transposed(g * (1 - self._share), out)
        self._other.add_matmul_transposed(g * self._share, out)

    def materialize(self, out: Tensor) -> Tensor:
        """Writes the values into `out`, formed in float32."""
        first, second = (torch.empty(self.shape, dtype=torch.float32, device=self.device) for _ in range(2))
        return out.copy_(self._weight.materialize(first).lerp_(self._other.materialize(second), self._share))

    def prefetch(self) -> None:
        """Nothing: both are here."""

    def tensors_by_category(self) -> dict[Category, list[Tensor]]:
        """Nothing of its own."""
        return {}
