"""From what a person types to a combination that can be made; the command line and the terminal UI use it."""

from __future__ import annotations

from collections.abc import Sequence

from edgepeft.errors import UsageError
from edgepeft.library.combine_parts import averaged_parts, weighted_parts
from edgepeft.library.combining import Plan, plan_combination


def plan_composition(
    name: str,
    adapters: Sequence[str],
    how: str,
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int | None = None,
) -> Plan:
    """The sum of `NAME=0.7 NAME@v2 FOLDER=-1`, as `plan_combination` plans it.

    Raises:
        UsageError: a word that cannot be meant.
        BadInput: the adapters cannot be combined.
    """
    if how == "factors":
        raise UsageError("factors are averaged, not composed", where="--how", hint="Use adapters average --factors")
    parts, notes = weighted_parts(adapters)
    return plan_combination(name, parts, how, rank=rank, density=density, seed=seed, notes=notes)


def plan_average(
    name: str, adapters: Sequence[str], by: str, *, rank: int | None = None, factors: bool = False
) -> Plan:
    """The mean of `NAME NAME:1200 FOLDER`: exact, cut to a rank, or of the factors.

    Raises:
        UsageError: a word that cannot be meant.
        BadInput: the adapters cannot be averaged.
    """
    if factors and rank is not None:
        raise UsageError(
            "averaged factors keep the rank of the adapters", where="--rank", hint="Use --rank or --factors"
        )
    how = "factors" if factors else "svd" if rank is not None else "exact"
    return plan_combination(name, averaged_parts(adapters, by), how, rank=rank)
