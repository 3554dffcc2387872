"""A frozen matrix to which something is added whenever it is formed for a product."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from edgepeft.engine.kernels import target_of
from edgepeft.engine.model.frozen import FrozenWeight, Workspace
from edgepeft.memory.breakdown import Category


class AddedWeight:
    """W and what `add` adds to it, see `FrozenWeight`; formed anew for each product, held by nobody.

    Args:
        weight: W.
        add: adds to a dense [out, in] in place.
        workspace: where the sum is formed.
    """

    def __init__(self, weight: FrozenWeight, add: Callable[[Tensor], None], workspace: Workspace) -> None:
        self.shape = weight.shape
        self.device = weight.device
        self._weight = weight
        self._add = add
        self._workspace = workspace

    def matmul(self, x: Tensor) -> Tensor:
        """`x @ W.T`."""
        values = self._formed()
        if target_of(x.device).kind == "cpu" and x.element_size() == 2 and x.numel() == x.shape[-1]:
            # As a dense weight does it.
            return torch.mv(values, x.reshape(-1)).view(*x.shape[:-1], -1)
        return F.linear(x, values)

    def matmul_transposed(self, g: Tensor) -> Tensor:
        """`g @ W`."""
        return torch.matmul(g, self._formed())

    def add_matmul_transposed(self, g: Tensor, out: Tensor) -> None:
        """`out += g @ W`."""
        out.addmm_(g, self._formed())

    def materialize(self, out: Tensor) -> Tensor:
        """Writes the sum into `out`."""
        self._add(self._weight.materialize(out))
        return out

    def prefetch(self) -> None:
        """As the weight itself."""
        self._weight.prefetch()

    def tensors_by_category(self) -> dict[Category, list[Tensor]]:
        """Nothing of its own."""
        return {}

    def _formed(self) -> Tensor:
        return self.materialize(self._workspace.borrow(self.shape))
