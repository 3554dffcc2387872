"""A matrix that takes the place of a frozen one in part: what lies between the two, formed for each product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgepeft.engine.model.frozen import FrozenWeight, Workspace
from edgepeft.memory.breakdown import Category


class BetweenWeight:
    """W + s (V - W), see `FrozenWeight`; computed in float32, held by nobody.

    Args:
        weight: W.
        other: V, [out, in].
        share: s.
        workspace: products go through it.
    """

    def __init__(self, weight: FrozenWeight, other: Tensor, share: float, workspace: Workspace) -> None:
        self.shape = weight.shape
        self.device = weight.device
        self._weight = weight
        self._other = other.detach()
        self._share = share
        self._workspace = workspace

    def matmul(self, x: Tensor) -> Tensor:
        """`x @ W.T`."""
        return F.linear(x, self._formed())

    def matmul_transposed(self, g: Tensor) -> Tensor:
        """`g @ W`."""
        return torch.matmul(g, self._formed())

    def add_matmul_transposed(self, g: Tensor, out: Tensor) -> None:
        """`out += g @ W`."""
        out.addmm_(g, self._formed())

    def materialize(self, out: Tensor) -> Tensor:
        """Writes the values into `out`."""
        values = self._weight.materialize(torch.empty(self.shape, dtype=torch.float32, device=self.device))
        return out.copy_(values.lerp_(self._other.float(), self._share))

    def prefetch(self) -> None:
        """Nothing: both are here."""

    def tensors_by_category(self) -> dict[Category, list[Tensor]]:
        """Nothing of its own."""
        return {}

    def _formed(self) -> Tensor:
        return self.materialize(self._workspace.borrow(self.shape))
