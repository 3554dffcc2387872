"""The embedding and the output head as sites: tables [vocabulary, hidden] that adapters replace or add to.

A model may have one table for both; what replaces it then replaces it twice, while what is added to one of the two
leaves the other as it is. Without active updates the model's own code runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from edgepeft.engine.ledger import assign

_FORMED_ROWS = 1 << 12
"""Of a table that lies between two, at a time."""


@runtime_checkable
class TableUpdate(Protocol):
    """What one adapter puts in place of a table; at a strength s the table is W + s (V - W)."""

    @property
    def table(self) -> Tensor:
        """V, [vocabulary, hidden]."""
        ...

    def tensors(self) -> tuple[Tensor, ...]:
        """The trained tensor."""
        ...


@runtime_checkable
class RowsUpdate(Protocol):
    """What one adapter adds to the rows that are looked up in an embedding."""

    def added_rows(self, ids: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
        """What is added to the rows [..., hidden] of ids [...], in a dtype; recorded by autograd."""
        ...

    def tensors(self) -> tuple[Tensor, ...]:
        """The trained tensors."""
        ...


class LowRank(NamedTuple):
    """What is added to the matrix of a head: factor · B · A, and what is dropped of its input on the way."""

    A: Tensor
    """[rank, hidden]."""
    B: Tensor
    """[vocabulary, rank]."""
    factor: float
    mask: Callable[[Tensor], Tensor | None] | None = None
    """From the hidden states [tokens, hidden] of a whole micro-batch to what dropout multiplies them with, None outside
    of training; None where nothing is ever dropped."""


@runtime_checkable
class HeadUpdate(Protocol):
    """What one adapter adds to an output head."""

    def low_rank(self, scale: float) -> LowRank:
        """Its product, which is never formed, with a strength."""
        ...

    def tensors(self) -> tuple[Tensor, ...]:
        """The trained tensors."""
        ...


class AdaptedTable:
    """An embedding or an output head whose table the active updates replace or add to.

    Args:
        module: its forward is replaced on the instance.
        name: its path in the model.
        reads_ids: whether it is an embedding.
    """

    def __init__(self, module: nn.Embedding | nn.Linear, name: str, *, reads_ids: bool) -> None:
        self.name = name
        self.module = module
        self.reads_ids = reads_ids
        self.adapters: dict[str, TableUpdate | RowsUpdate | HeadUpdate] = {}
        self.active: list[tuple[str, float]] = []
        self._forward: Any = module.forward
        module.__dict__["forward"] = self._run

    @property
    def own(self) -> Tensor:
        """The base's table."""
        return self.module.weight

    def activate(self, active: Sequence[tuple[str, float]]) -> None:
        """See `Site`."""
        self.active = list(active)

    def table(self) -> Tensor:
        """What is in force, without what is added to it: the base's own, a trained tensor itself, or one that lies
        between, float32 and formed."""
        table = self.own
        for other, scale in self._replacing():
            table = other if scale == 1 else _between(table, other, scale)
        return table

    def added(self) -> tuple[LowRank, ...]:
        """What is added to the matrix of a head."""
        uses = [(self.adapters[name], scale) for name, scale in self.active]
        return tuple(update.low_rank(scale) for update, scale in uses if isinstance(update, HeadUpdate))

    def _run(self, x: Tensor) -> Tensor:
        if not self.active:
            out: Tensor = self._forward(x)
            return out
        return self._rows(x) if self.reads_ids else self._product(x)

    def _replacing(self) -> list[tuple[Tensor, float]]:
        """The tables that take the place of the one before, each with its strength."""
        uses = [(self.adapters[name], scale) for name, scale in self.active]
        return [(update.table, scale) for update, scale in uses if isinstance(update, TableUpdate)]

    def _rows(self, ids: Tensor) -> Tensor:
        """Rows [..., hidden] of what is in force, which is not formed for them."""
        # Some models of the Gemma family multiply what they look up.
        factor: Tensor | None = getattr(self.module, "embed_scale", None)

        def scaled(rows: Tensor) -> Tensor:
            return rows if factor is None else rows * torch.as_tensor(factor).to(rows.dtype)

        replacing = self._replacing()
        rows: Tensor = scaled(self._replaced_rows(ids, replacing)) if replacing else self._forward(ids)
        for name, scale in self.active:
            update = self.adapters[name]
            if isinstance(update, RowsUpdate):
                rows = rows + scaled(update.added_rows(ids, rows.dtype, scale))
        return rows

    def _replaced_rows(self, ids: Tensor, replacing: Sequence[tuple[Tensor, float]]) -> Tensor:
        table, scale = replacing[-1]
        if scale == 1:
            return _look_up(ids, table, self.own.dtype)
        rows = F.embedding(ids, self.own).float()
        for table, scale in replacing:
            rows = torch.lerp(rows, F.embedding(ids, table).float(), scale)
        return rows.to(self.own.dtype)

    def _product(self, x: Tensor) -> Tensor:
        """x times what is in force, which is not formed for it."""
        replacing = self._replacing()
        y: Tensor = self._replaced_product(x, replacing) if replacing else self._forward(x)
        for added in self.added():
            y = y + F.linear(F.linear(x, added.A.to(x.dtype)), added.B.to(x.dtype)) * added.factor
        return y

    def _replaced_product(self, x: Tensor, replacing: Sequence[tuple[Tensor, float]]) -> Tensor:
        table, scale = replacing[-1]
        bias: Tensor | None = getattr(self.module, "bias", None)
        if scale == 1:
            return F.linear(x, table.to(x.dtype), bias)
        y = F.linear(x, self.own.to(x.dtype))
        for table, scale in replacing:
            y = torch.lerp(y, F.linear(x, table.to(x.dtype)), scale)
        return y if bias is None else y + bias


def _between(own: Tensor, other: Tensor, scale: float) -> Tensor:
    """W + s (V - W), float32 [vocabulary, hidden]."""
    if torch.is_grad_enabled() and other.requires_grad:
        return torch.lerp(own.float(), other.float(), scale)
    formed = torch.empty(own.shape, dtype=torch.float32, device=own.device)
    for start in range(0, own.shape[0], _FORMED_ROWS):
        rows = slice(start, start + _FORMED_ROWS)
        torch.lerp(own.detach()[rows].float(), other.detach()[rows].float(), scale, out=formed[rows])
    return formed


def _look_up(ids: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows [..., hidden] of a table in `dtype`."""
    if not (torch.is_grad_enabled() and table.requires_grad and table.is_leaf):
        return F.embedding(ids, table).to(dtype)
    apply: Any = _Lookup.apply
    # The graph must not lead to the table: autograd would keep the head's gradient of it until the last layer is done.
    rows: Tensor = apply(ids, torch.empty(0, device=table.device, requires_grad=True), [table], dtype)
    return rows


class _Lookup(torch.autograd.Function):
    """Rows of a trained table, float32, in another dtype.

    Their gradient is added to what the table has already, row by row: a dense one of its own never exists.
    """

    @staticmethod
    def forward(ctx: Any, ids: Tensor, anchor: Tensor, table: list[Tensor], dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(ids)
        (ctx.table,) = table
        return F.embedding(ids, ctx.table).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        table = ctx.table
        if table.grad is None:
            table.grad = torch.zeros_like(table)
            assign([table.grad], "gradients")
        table.grad.index_add_(0, ids.reshape(-1), g.reshape(-1, g.shape[-1]).float())
        return None, None, None, None


def find_tables(model: Any) -> dict[str, AdaptedTable]:
    """The embedding and the output head by path, as far as they are single tables."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found: dict[str, AdaptedTable] = {}
    for path, module in model.named_modules():
        if module is embedding and isinstance(module, nn.Embedding):
            found[path] = AdaptedTable(module, path, reads_ids=True)
        elif module is head and isinstance(module, nn.Linear):
            found[path] = AdaptedTable(module, path, reads_ids=False)
    return found
