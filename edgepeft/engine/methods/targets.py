"""What of a loaded model the targets of a method stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgepeft.engine.model.linear import AdaptedLinear
from edgepeft.engine.model.tables import AdaptedTable
from edgepeft.errors import UsageError
from edgepeft.methods.targets import TABLE_NAMES, means, table_of


def resolve_targets(targets: Sequence[str], linears: Mapping[str, AdaptedLinear]) -> list[str]:
    """The module paths that targets stand for, in the model's order.

    `all-linear` stands for every linear of every decoder layer; anything else is a module path or its ending.

    Raises:
        UsageError: a target matches nothing.
    """
    chosen: set[str] = set()
    for target in targets:
        matches = {path for path in linears if target == "all-linear" or means(target, path)}
        if not matches:
            known = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in linears}))
            raise UsageError(
                f"target {target!r} matches no linear layer of this model", where="targets", hint=f"It has: {known}"
            )
        chosen |= matches
    return [path for path in linears if path in chosen]


def adaptable(linears: Mapping[str, AdaptedLinear]) -> dict[str, AdaptedLinear]:
    """Without what chooses or weighs experts by a single number."""
    return {path: linear for path, linear in linears.items() if min(linear.weight_source.shape) > 1}


def targeted_tables(targets: Sequence[str], tables: Mapping[str, AdaptedTable]) -> dict[str, AdaptedTable]:
    """The embedding and the output head as far as targets mean them, by path, in the model's order.

    A target is a path, its ending, or what any model calls the table.

    Raises:
        UsageError: a target means a table that this model does not have.
    """
    chosen: set[str] = set()
    for target in targets:
        table = table_of(target)
        if table is None:
            continue
        matches = {
            path
            for path, found in tables.items()
            if found.reads_ids == (table == "embedding") and (target in TABLE_NAMES[table] or means(target, path))
        }
        if not matches:
            known = ", ".join(tables) or "neither embedding nor head as a table"
            raise UsageError(f"target {target!r} is not in this model", where="targets", hint=f"It has: {known}")
        chosen |= matches
    return {path: table for path, table in tables.items() if path in chosen}
