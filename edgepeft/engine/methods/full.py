"""The tensors of full fine-tuning; config and paper are in edgepeft.methods.full.

Everything is float32 and begins as the base has it. A strength s uses what lies between: W + s (V - W).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgepeft.engine.methods import own_files
from edgepeft.engine.methods.adapter import Parts, Update, trained_copy
from edgepeft.engine.methods.norm import NormUpdate
from edgepeft.engine.methods.own_files import settings_of
from edgepeft.engine.model.frozen import DenseWeight, FrozenWeight, Int8Weight, Nf4Weight
from edgepeft.engine.model.linear import AdaptedLinear, LinearUpdate
from edgepeft.engine.model.load import LoadedModel
from edgepeft.engine.model.replaced import BetweenWeight
from edgepeft.engine.model.tables import AdaptedTable
from edgepeft.errors import BadInput, UsageError
from edgepeft.methods.full import FullConfig, cannot_train

__all__ = ["build", "restore", "settings_of"]

_PRECISIONS: Mapping[type, str] = {Nf4Weight: "nf4", Int8Weight: "int8"}


class LinearCopy(LinearUpdate):
    """The matrix of one linear, and its bias where it has one.

    Args:
        linear: whose values it begins with.
        loaded: the base.
    """

    keeps_input = replaces_weight = True

    def __init__(self, linear: AdaptedLinear, loaded: LoadedModel) -> None:
        self.weight = trained_copy(linear.weight_source, loaded)
        self.bias = None if linear.bias is None else trained_copy(linear.bias, loaded)
        self._workspace = loaded.workspace

    @property
    def alters(self) -> tuple[str, ...]:
        """All that the linear has."""
        return tuple(self.named_tensors())

    def merge_into(self, parameter: str, values: Tensor, rows: slice) -> None:
        """The copies take their place; see `Mergeable`."""
        values.copy_(self.named_tensors()[parameter].detach()[rows])

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """As the model names them."""
        return {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})

    def tensors(self) -> tuple[Tensor, ...]:
        """The same."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def replace(self, weight: FrozenWeight, bias: Tensor | None, scale: float) -> tuple[FrozenWeight, Tensor | None]:
        """The copies, or what lies between."""
        own = None if self.bias is None else self.bias.detach()
        copy = DenseWeight(self.weight, self._workspace)
        if scale == 1:
            return copy, own
        mixed = None if own is None or bias is None else torch.lerp(bias.float(), own.float(), scale)
        return BetweenWeight(weight, copy, scale), mixed

    def add_forward(self, x: Tensor, y: Tensor, scale: float) -> tuple[Tensor, ...]:
        """Nothing is added."""
        return ()

    def add_backward(
        self, x: Tensor | None, g: Tensor, grad_x: Tensor | None, scale: float, kept: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """dW = s gᵀ x, formed in the compute dtype; db = s Σ g over the tokens."""
        if x is None:
            return (None,) * len(self.tensors())
        weight = (g.t() @ x).to(torch.float32)
        bias = () if self.bias is None else (g.sum(0, dtype=torch.float32),)
        return tuple(value if scale == 1 else value.mul_(scale) for value in (weight, *bias))


class TableCopy:
    """An embedding or an output head.

    Args:
        table: trained; one tensor where the model has one for both.
        named: whether it is this site under whose name it goes into a file.
    """

    alters = ("weight",)

    def __init__(self, table: nn.Parameter, *, named: bool = True) -> None:
        self.table = table
        self._named = named

    def merge_into(self, parameter: str, values: Tensor, rows: slice) -> None:
        """The table takes its place; see `Mergeable`."""
        values.copy_(self.table.detach()[rows])

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """As the model names it."""
        return {"weight": self.table} if self._named else {}

    def tensors(self) -> tuple[Tensor, ...]:
        """The table."""
        return (self.table,)


def build(loaded: LoadedModel, config: FullConfig, seed: int) -> Parts:
    """See `EngineMethod`: copies of everything.

    Raises:
        UsageError: the base is quantized, or has parameters that are of no kind known here.
    """
    linears, norms, tables = loaded.linears(), loaded.norms(), loaded.tables()
    _check_dense(loaded)
    _check_complete(loaded)
    updates: dict[str, Update] = {path: LinearCopy(linear, loaded) for path, linear in linears.items()}
    updates |= {path: NormUpdate.on(norm, loaded, prefix="") for path, norm in norms.items()}
    trained: dict[int, nn.Parameter] = {}
    for path, table in tables.items():
        named = id(table.own) not in trained
        if named:
            trained[id(table.own)] = trained_copy(table.own, loaded)
        updates[path] = TableCopy(trained[id(table.own)], named=named)
    return Parts(updates)


def restore(
    loaded: LoadedModel, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> tuple[FullConfig, Parts]:
    """See `EngineMethod`."""
    try:
        _check_dense(loaded)
    except UsageError as error:
        raise BadInput(error.what, where=str(folder), hint=error.hint) from error
    return own_files.restore_own(FullConfig, build, loaded, settings, tensors, folder)


def _check_dense(loaded: LoadedModel) -> None:
    for linear in loaded.linears().values():
        precision = _PRECISIONS.get(type(linear.weight_source))
        if precision is not None:
            raise UsageError(cannot_train(precision), where="--precision", hint="Use --precision bf16")


def _check_complete(loaded: LoadedModel) -> None:
    """Refuses a model of which a part would stay as it is."""
    tables = [table for table in loaded.tables().values() if _is_plain(table)]
    known: list[Tensor] = [linear.bias for linear in loaded.linears().values() if linear.bias is not None]
    known += [value for norm in loaded.norms().values() for value in norm.own().values()]
    known += [table.own for table in tables]
    ours = {id(parameter) for parameter in known}
    strange = [name for name, parameter in loaded.model.named_parameters() if id(parameter) not in ours]
    if len(tables) < 2:
        strange.append("its embedding or its output head")
    if strange:
        kind = type(loaded.model).__name__
        raise UsageError(
            f"{kind} cannot be trained as a whole: {strange[0]} is of no kind that edgepeft trains",
            where="--method",
            hint="Use --method lora",
        )


def _is_plain(table: AdaptedTable) -> bool:
    """Whether its module looks up rows, perhaps times a number, or multiplies with the table, and nothing else."""
    kind = type(table.module)
    plain = kind.forward in (nn.Embedding.forward, nn.Linear.forward)
    return plain or (issubclass(kind, nn.Embedding) and hasattr(table.module, "embed_scale"))
