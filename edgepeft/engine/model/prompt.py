"""Embeddings that stand before every sample, as if they were those of tokens (prompt tuning, arXiv 2104.08691)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class PromptUpdate(Protocol):
    """The rows of one adapter."""

    rows: Tensor
    """[tokens, hidden]."""


class PromptSite:
    """The place before the samples at the entry of a model; the rows of adapters stand there one after another."""

    name = "prompt"

    def __init__(self) -> None:
        self.adapters: dict[str, PromptUpdate] = {}
        self.active: list[tuple[str, float]] = []

    def activate(self, active: Sequence[tuple[str, float]]) -> None:
        """See `Site`."""
        self.active = list(active)

    @property
    def tokens(self) -> int:
        """Rows of all active adapters."""
        return sum(self.adapters[name].rows.shape[0] for name, _ in self.active)

    def rows(self) -> Tensor:
        """Those of all active adapters, [tokens, hidden], each times the strength of use; recorded by autograd."""
        found = [
            self.adapters[name].rows * scale if scale != 1 else self.adapters[name].rows for name, scale in self.active
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def put_before(self, embeddings: Tensor, lengths: Sequence[int]) -> Tensor:
        """Sets the first rows of every sample of a packed row; changes `embeddings` in place.

        Args:
            embeddings: [1, tokens, hidden], without a gradient; its first rows of each sample count for nothing.
            lengths: of the samples, those rows included.
        """
        starts = torch.tensor([0, *accumulate(lengths)][:-1], device=embeddings.device)
        rows = self.rows()
        places = starts.unsqueeze(1) + torch.arange(rows.shape[0], device=embeddings.device)
        apply: Any = _Prompted.apply
        out: Tensor = apply(embeddings, rows, places)
        return out


class _Prompted(torch.autograd.Function):
    """Embeddings [1, tokens, hidden] with `rows` [count, hidden] at `places` [samples, count]."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        embeddings[0].index_put_((places,), rows.to(embeddings.dtype))
        ctx.mark_dirty(embeddings)
        ctx.places, ctx.dtype = places, rows.dtype
        return embeddings

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts = gradient[0].index_select(0, ctx.places.flatten()).view(*ctx.places.shape, -1)
        return None, parts.sum(0, dtype=ctx.dtype), None
