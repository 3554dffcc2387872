"""`edgepeft adapters compose` and `average`: one adapter made from others, without training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from edgepeft.cli.output import JsonFlag, note, print_json, tell_lines

if TYPE_CHECKING:
    from edgepeft.library.card import Card
    from edgepeft.library.combining import Combined, Plan
    from edgepeft.library.store import AdapterFolder

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
    from edgepeft.library.combine_words import plan_composition

    _combine(plan_composition(name, adapters, how, rank=rank, density=density, seed=seed), "composed", as_json)


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
    from edgepeft.library.combine_words import plan_average

    _combine(plan_average(name, adapters, by, rank=rank, factors=factors), "averaged", as_json)


def _combine(plan: Plan, command: Literal["composed", "averaged"], as_json: bool) -> None:
    from edgepeft.cli.worker_progress import timed_progress
    from edgepeft.library.combine_client import combine
    from edgepeft.library.combine_text import say_combined

    with timed_progress() as progress:
        adapter, made = combine(plan, command, progress)
    assert adapter.card is not None
    if as_json:
        print_json(_as_json(plan, adapter, adapter.card, made))
        return
    for text in adapter.card.notes:
        note(f"Note: {text}", "yellow")
    tell_lines(say_combined(plan, adapter, made))


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
