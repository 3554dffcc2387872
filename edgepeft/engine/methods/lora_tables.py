"""LoRA of an embedding; config, paper and counts are in edgepeft.methods.lora.

Its rows become E[ids] + s (Aᵀ)[ids] Bᵀ with A [rank, vocabulary] and B [hidden, rank]. Here it is A that starts at
zero: a row of Aᵀ is what a single token learns. An output head gets the update of any linear (`engine.methods.lora`),
which is added where its logits are made, a chunk at a time (`engine.training.loss`). Where a model has one table for
both, either is changed without the other, as PEFT does it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from edgepeft.engine.ledger import assign
from edgepeft.engine.methods.seeds import generator_of


class EmbeddingLora:
    """A and B of an embedding, and the trained scale s.

    Nothing is dropped, as PEFT drops nothing here. A padding token is trained where the data has it as a token of its
    own, which PEFT leaves out: some models end answers with it.
    """

    alters = ("weight",)

    def __init__(self, A: nn.Parameter, B: nn.Parameter, factor: float) -> None:
        self.A = A
        self.B = B
        self.factor = factor

    @classmethod
    def initialised(
        cls, rank: int, factor: float, shape: tuple[int, int], module: str, seed: int, device: torch.device
    ) -> EmbeddingLora:
        """A zero and B standard normal, as PEFT draws it, for a table of `shape` [vocabulary, hidden]."""
        vocabulary, hidden = shape
        A = torch.zeros(rank, vocabulary)
        B = torch.empty(hidden, rank).normal_(generator=generator_of(seed, module))
        return cls(nn.Parameter(A.to(device)), nn.Parameter(B.to(device)), factor)

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """A and B under the names that PEFT's files use."""
        return {"lora_embedding_A": self.A, "lora_embedding_B": self.B}

    def tensors(self) -> tuple[Tensor, ...]:
        """A and B."""
        return self.A, self.B

    def merge_into(self, parameter: str, values: Tensor, rows: slice) -> None:
        """E += s Aᵀ Bᵀ; see `Mergeable`."""
        with torch.no_grad():
            values.addmm_(self.A[:, rows].float().t(), self.B.float().t(), alpha=self.factor)

    def added_rows(self, ids: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
        """See `RowsUpdate`."""
        apply: Any = _AddedRows.apply
        rows: Tensor = apply(ids, self.B, [self.A], self.factor * scale, dtype)
        return rows


class _AddedRows(torch.autograd.Function):
    """s (Aᵀ)[ids] Bᵀ. The gradient of A is added to what A has already, column by column: a dense one of its own,
    as wide as the vocabulary, never exists."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, B: Tensor, boxed: list[Tensor], factor: float, dtype: torch.dtype) -> Tensor:
        (A,) = boxed
        flat = ids.reshape(-1)
        inner = A.index_select(1, flat).to(dtype).t()
        ctx.save_for_backward(flat, B, inner)
        ctx.A, ctx.factor = A, factor
        return (inner @ B.to(dtype).t()).mul_(factor).view(*ids.shape, B.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        ids, B, inner = ctx.saved_tensors
        A: Tensor = ctx.A
        g = g.reshape(-1, g.shape[-1])
        g_inner = (g @ B.to(g.dtype)).mul_(ctx.factor)
        if A.grad is None:
            A.grad = torch.zeros_like(A)
            assign([A.grad], "gradients")
        A.grad.index_add_(1, ids, g_inner.t().to(A.dtype))
        return None, (g.t() @ inner).to(B.dtype).mul_(ctx.factor), None, None, None
