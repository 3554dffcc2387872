"""`edgepeft adapters compose` and `average`: one adapter made from others, without training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from edgepeft.cli.output import JsonFlag, line, note, print_json

if TYPE_CHECKING:
    from edgepeft.library.card import Card, Combination, How
    from edgepeft.library.combining import Combined, Plan
    from edgepeft.library.store import AdapterFolder

_NOT_THE_SUM = (
    "Adding factors is not adding updates: (B₁+B₂)(A₁+A₂) also has the products B₁A₂ and B₂A₁. "
    "This result is {distance} away from the {sum} of the updates; {instead} has no such error."
)

Name = Annotated[str, typer.Option("--name", help="Name in the library; the result is its next version.")]


def compose(
    adapters: Annotated[list[str], typer.Argument(help="NAME=0.7, NAME@v2=0.3 or FOLDER; without =w the weight is 1.")],
    name: Name,
    how: Annotated[
        str,
        typer.Option(
            "--how",
            help="exact: ranks side by side, the weighted sum itself. svd: the sum cut to --rank. "
            "ties, dare: merged entry by entry, then cut to --rank. linear: factors added, as in PEFT; not the sum.",
        ),
    ] = "exact",
    rank: Annotated[
        int | None,
        typer.Option("--rank", help="Of svd, ties and dare; by default the largest that goes in.", show_default=False),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            "--density", help="Share of entries kept by ties (0.2 by default) and dare (0.5).", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of what dare drops; 0 by default.", show_default=False)
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Add adapters of one base up, each with a weight."""
    from edgepeft.errors import UsageError
    from edgepeft.library.combine_parts import weighted_parts
    from edgepeft.library.combining import plan_combination

    if how == "factors":
        raise UsageError("factors are averaged, not composed", where="--how", hint="Use adapters average --factors")
    parts, notes = weighted_parts(adapters)
    plan = plan_combination(name, parts, how, rank=rank, density=density, seed=seed, notes=notes)
    _combine(plan, "composed", as_json)


def average(
    adapters: Annotated[
        list[str], typer.Argument(help="NAME, NAME@v2 or FOLDER; NAME:1200 for its number of training samples.")
    ],
    name: Name,
    by: Annotated[
        str, typer.Option("--by", help="samples: each adapter's share of all training samples. equal: all alike.")
    ] = "samples",
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", help="Cut the average to this rank; by default it is exact, with all ranks.", show_default=False
        ),
    ] = None,
    factors: Annotated[
        bool, typer.Option("--factors", help="Average A and B one by one instead of the updates, as plain FedAvg does.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Average adapters of one base that were trained in different places (federated averaging)."""
    from edgepeft.errors import UsageError
    from edgepeft.library.combine_parts import averaged_parts
    from edgepeft.library.combining import plan_combination

    if factors and rank is not None:
        raise UsageError(
            "averaged factors keep the rank of the adapters", where="--rank", hint="Use --rank or --factors"
        )
    parts = averaged_parts(adapters, by)
    plan = plan_combination(name, parts, "factors" if factors else "svd" if rank is not None else "exact", rank=rank)
    _combine(plan, "averaged", as_json)


def combination_lines(card: Card, combined: Combination) -> list[tuple[str, str]]:
    """How a combined adapter was made, for `adapters show`."""
    lines = [
        ("made", f"{card.created}, {combined.command} from {len(combined.parts)} adapters without training"),
        ("how", f"{combined.how}: {_kind(combined.how, combined.density, combined.seed)}"),
    ]
    for part in combined.parts:
        samples = f", {part.samples:,} samples" if part.samples else ""
        lines.append(("part", f"{part.weight:.6g} × {part.adapter}{samples}, {part.sha256}"))
    if combined.energy_kept is not None:
        lines.append(("cut", f"to rank {combined.rank}, which keeps {format_kept(combined.energy_kept)} of the energy"))
    if combined.how != "exact":
        lines.append(("away from the sum", f"{_percent(combined.distance)} of its norm"))
    return lines


def format_kept(share: float) -> str:
    """A share of the energy, with enough digits that what was lost is seen: `99.9987 %`."""
    lost = 1.0 - share
    digits = 1 if lost <= 1e-12 else max(1, 1 - math.floor(math.log10(100 * lost)))
    return f"{100 * share:.{digits}f} %"


def _combine(plan: Plan, command: Literal["composed", "averaged"], as_json: bool) -> None:
    from edgepeft.cli.worker_progress import timed_progress
    from edgepeft.library.combine_client import combine

    with timed_progress() as progress:
        adapter, made = combine(plan, command, progress)
    assert adapter.card is not None
    if as_json:
        print_json(_as_json(plan, adapter, adapter.card, made))
        return
    for text in adapter.card.notes:
        note(f"Note: {text}", "yellow")
    _tell(plan, adapter, made)


def _as_json(plan: Plan, adapter: AdapterFolder, card: Card, made: Combined) -> dict[str, Any]:
    combined = card.combined
    assert combined is not None
    return {
        "reference": adapter.reference,
        "path": str(adapter.path),
        "bytes": adapter.weights.stat().st_size,
        "base": plan.base or None,
        "how": combined.how,
        "parts": combined.parts,
        "rank": plan.rank,
        "ranks": made.ranks,
        "density": plan.density,
        "seed": plan.seed,
        "energy_kept": made.energy_kept,
        "least_energy_kept": made.least_energy_kept,
        "least_energy_module": made.least_energy_module or None,
        "distance": made.distance,
        "worst_distance": made.worst_distance,
        "worst_module": made.worst_module or None,
        "notes": card.notes,
    }


def _tell(plan: Plan, adapter: AdapterFolder, made: Combined) -> None:
    from edgepeft.units import format_bytes

    line(f"{adapter.reference} = {' + '.join(f'{part.weight:.4g} × {part.adapter.reference}' for part in plan.parts)}")
    ranks = sorted(set(made.ranks.values()))
    told = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    kind = _kind(plan.how, plan.density, plan.seed)
    size = format_bytes(adapter.weights.stat().st_size)
    line(f"  {kind}: rank {told} on {len(made.ranks)} linears, {size}")
    if made.energy_kept is not None:
        least = ""
        if made.least_energy_kept is not None and made.least_energy_module:
            least = f"; least in {made.least_energy_module}: {format_kept(made.least_energy_kept)}"
        lost = _percent(max(0.0, 1 - made.energy_kept))
        line(f"  energy kept by the cut: {format_kept(made.energy_kept)}, lost {lost}{least}")
    if plan.how in ("linear", "factors"):
        average = plan.how == "factors"
        text = _NOT_THE_SUM.format(
            distance=_percent(made.distance),
            sum="weighted mean" if average else "weighted sum",
            instead="the average without --factors" if average else "--how exact",
        )
        line(f"  {text}", "yellow")
    elif plan.how != "exact":
        line(f"  {_percent(made.distance)} away from the weighted sum (Frobenius norm)")


def _kind(how: How, density: float | None, seed: int | None) -> str:
    kept = f"{_percent(density or 0)} of the entries kept"
    return {
        "exact": "the weighted sum itself, ranks side by side",
        "svd": "the weighted sum, cut by SVD",
        "linear": "factors added",
        "factors": "factors averaged",
        "ties": f"TIES, {kept}, cut by SVD",
        "dare": f"DARE, {kept} (seed {seed}), cut by SVD",
    }[how]


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
