"""What a combination of adapters is, and what came of it, in words that the command line and the terminal UI share."""

from __future__ import annotations

import math

import msgspec

from edgepeft.library.card import Card, Combination, How
from edgepeft.library.combining import Combined, Plan
from edgepeft.library.store import AdapterFolder
from edgepeft.units import format_bytes

_NOT_THE_SUM = (
    "Adding factors is not adding updates: (B₁+B₂)(A₁+A₂) also has the products B₁A₂ and B₂A₁. "
    "This result is {distance} away from the {sum} of the updates; {instead} has no such error."
)


class Said(msgspec.Struct, frozen=True):
    """One line of what came of some work."""

    text: str
    careful: bool = False
    """Whether it is something to be careful about."""


def combination_lines(card: Card, combined: Combination) -> list[tuple[str, str]]:
    """How a combined adapter was made: what a line is about, and the line."""
    lines = [
        ("made", f"{card.created}, {combined.command} from {len(combined.parts)} adapters without training"),
        ("how", f"{combined.how}: {say_how(combined.how, combined.density, combined.seed)}"),
    ]
    for part in combined.parts:
        samples = f", {part.samples:,} samples" if part.samples else ""
        lines.append(("part", f"{part.weight:.6g} × {part.adapter}{samples}, {part.sha256}"))
    if combined.energy_kept is not None:
        lines.append(("cut", f"to rank {combined.rank}, which keeps {format_kept(combined.energy_kept)} of the energy"))
    if combined.how != "exact":
        lines.append(("away from the sum", f"{_percent(combined.distance)} of its norm"))
    return lines


def say_combined(plan: Plan, adapter: AdapterFolder, made: Combined) -> list[Said]:
    """What a combination became: its formula, its rank and size, and how far it is from the weighted sum."""
    formula = " + ".join(f"{part.weight:.4g} × {part.adapter.reference}" for part in plan.parts)
    ranks = sorted(set(made.ranks.values()))
    told = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    kind = say_how(plan.how, plan.density, plan.seed)
    size = format_bytes(adapter.weights.stat().st_size)
    lines = [
        Said(f"{adapter.reference} = {formula}"),
        Said(f"{kind}: rank {told} on {len(made.ranks)} linears, {size}"),
    ]
    if made.energy_kept is not None:
        least = ""
        if made.least_energy_kept is not None and made.least_energy_module:
            least = f"; least in {made.least_energy_module}: {format_kept(made.least_energy_kept)}"
        lost = _percent(max(0.0, 1 - made.energy_kept))
        lines.append(Said(f"energy kept by the cut: {format_kept(made.energy_kept)}, lost {lost}{least}"))
    if plan.how in ("linear", "factors"):
        average = plan.how == "factors"
        text = _NOT_THE_SUM.format(
            distance=_percent(made.distance),
            sum="weighted mean" if average else "weighted sum",
            instead="the average without --factors" if average else "--how exact",
        )
        lines.append(Said(text, careful=True))
    elif plan.how != "exact":
        lines.append(Said(f"{_percent(made.distance)} away from the weighted sum (Frobenius norm)"))
    return lines


def say_how(how: How, density: float | None, seed: int | None) -> str:
    """What a kind of combination does, as a clause."""
    kept = f"{_percent(density or 0)} of the entries kept"
    return {
        "exact": "the weighted sum itself, ranks side by side",
        "svd": "the weighted sum, cut by SVD",
        "linear": "factors added",
        "factors": "factors averaged",
        "ties": f"TIES, {kept}, cut by SVD",
        "dare": f"DARE, {kept} (seed {seed}), cut by SVD",
    }[how]


def format_kept(share: float) -> str:
    """A share of the energy, with enough digits that what was lost is seen: `99.9987 %`."""
    lost = 1.0 - share
    digits = 1 if lost <= 1e-12 else max(1, 1 - math.floor(math.log10(100 * lost)))
    return f"{100 * share:.{digits}f} %"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
