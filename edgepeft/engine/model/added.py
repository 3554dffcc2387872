"""A frozen matrix to which something is added whenever it is formed for a product."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from edgepeft.engine.model.frozen import FrozenWeight, Workspace
from edgepeft.memory.breakdown import Category

FEW_ROWS = 4
"""Rows of an input up to which forming the sum costs more than adding to the product."""


class Addition(Protocol):
    """What is added to a matrix."""

    def add_to(self, dense: Tensor) -> None:
        """Adds it to [out, in] in place."""
        ...

    def add_product(self, x: Tensor, y: Tensor) -> None:
        """Adds its product with x [rows, in] to y [rows, out] in place."""
        ...


class AddedWeight:
    """W and an addition, see `FrozenWeight`; formed anew for each product, held by nobody.

    Args:
        weight: W.
        addition: to it.
        workspace: where the sum is formed.
    """

    def __init__(self, weight: FrozenWeight, addition: Addition, workspace: Workspace) -> None:
        self.shape = weight.shape
        self.device = weight.device
        self._weight = weight
        self._addition = addition
        self._workspace = workspace

    def matmul(self, x: Tensor) -> Tensor:
        """`x @ W.T`; for few rows, as when a chat answers, the sum is not formed."""
        if x.numel() > FEW_ROWS * x.shape[-1]:
            return F.linear(x, self._formed())
        y = self._weight.matmul(x)
        self._addition.add_product(x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]))
        return y

    def matmul_transposed(self, g: Tensor) -> Tensor:
        """`g @ W`."""
        return torch.matmul(g, self._formed())

    def add_matmul_transposed(self, g: Tensor, out: Tensor) -> None:
        """`out += g @ W`."""
        out.addmm_(g, self._formed())

    def materialize(self, out: Tensor) -> Tensor:
        """Writes the sum into `out`."""
        self._addition.add_to(self._weight.materialize(out))
        return out

    def prefetch(self) -> None:
        """As the weight itself."""
        self._weight.prefetch()

    def tensors_by_category(self) -> dict[Category, list[Tensor]]:
        """Nothing of its own."""
        return {}

    def _formed(self) -> Tensor:
        return self.materialize(self._workspace.borrow(self.shape))
