"""`edgepeft fits`: which models fit which cards, and how."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

from edgepeft.cli.output import JsonFlag, line, print_json
from edgepeft.cli.output import console as out

if TYPE_CHECKING:
    from edgepeft.plan.device import PlanDevice
    from edgepeft.plan.fits import Fit

_NONE = "–"
_GAP = "  "


def fits(
    gpu: Annotated[
        list[str] | None,
        typer.Option("--gpu", help="Card, as plan takes it; repeatable, or with commas. Else one of each usual size."),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option("--models", help="Models, repeatable or with commas; all for every one. Else usual sizes."),
    ] = None,
    seq_len: Annotated[
        int, typer.Option("--seq-len", "--max-seq-len", help="Tokens of the longest sample.", min=2)
    ] = 2048,
    intent: Annotated[
        str, typer.Option("--intent", help="Preset: quality, balanced, speed or prototype.")
    ] = "balanced",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show which models can be trained on which cards, and how."""
    from edgepeft.plan.fits import find_bases, find_cards, fit_all
    from edgepeft.profiles import find_preset

    preset = find_preset(intent)
    cards = find_cards(gpu or ())
    found = fit_all(find_bases(models or ()), cards, preset, seq_len)
    if as_json:
        print_json(found)
        return
    heads = _heads(cards)
    rows = [
        (name, [_cell(fit) for fit in found[place : place + len(cards)]])
        for place, name in zip(range(0, len(found), len(cards)), _models(found, len(cards)), strict=True)
    ]
    legend = _legend(found, preset.id, seq_len)
    sizes = _sizes(cards, heads)
    if markdown:
        _print_markdown(heads, rows, (legend, sizes))
        return
    _print_blocks(heads, rows)
    line()
    for text in (legend, sizes):
        for part in textwrap.wrap(text, max(40, min(out.width, 110)), break_on_hyphens=False):
            line(part, "dim")


def _models(found: list[Fit], columns: int) -> list[str]:
    return [found[place].model for place in range(0, len(found), columns)]


def _cell(fit: Fit) -> str:
    if fit.way is None:
        return _NONE
    text = f"{fit.way.precision} r{fit.way.rank}"
    return f"({text})" if fit.shortened else text


def _heads(cards: list[PlanDevice]) -> list[str]:
    """`24 GB` where that tells the cards apart, else their ids."""
    sizes = [match.group(1) if (match := re.search(r"-(\d+)gb$", card.id)) else "" for card in cards]
    if all(sizes) and len(set(sizes)) == len(sizes):
        return [f"{size} GB" for size in sizes]
    return [card.name if card.present and card.kind == "cuda" else card.id for card in cards]


def _sizes(cards: list[PlanDevice], heads: list[str]) -> str:
    from edgepeft.units import format_gib

    if heads[0].endswith(" GB"):
        names = ", ".join(f"{card.name} ({head})" for card, head in zip(cards, heads, strict=True))
        return f"One card of each size: {names}. What a desktop needs is left free."
    told = (f"{head} {format_gib(card.budget_bytes, digits=1)}" for card, head in zip(cards, heads, strict=True))
    return f"What a run may use: {', '.join(told)}."


def _legend(found: list[Fit], preset: str, seq_len: int) -> str:
    ways = [fit.way for fit in found if fit.way is not None]
    words = {
        "fp32": "fp32: the base in 32 bit",
        "bf16": "bf16: the base unquantized in 16 bit",
        "fp16": "fp16: the base unquantized in 16 bit",
        "int8": "int8: 8 bit, nearly exact",
        "nf4": "nf4: 4 bit, as in QLoRA",
    }
    used = [text for name, text in words.items() if any(way.precision == name for way in ways)]
    parts = [f"How a LoRA adapter can be trained on samples of up to {seq_len:,} tokens (preset {preset})", *used]
    if ways:
        parts.append("r16: rank 16, the size of the adapter")
    if any(fit.shortened for fit in found):
        lengths = [way.max_seq_len for fit in found if fit.shortened and (way := fit.way) is not None]
        span = f"{min(lengths):,}" if min(lengths) == max(lengths) else f"{min(lengths):,} to {max(lengths):,}"
        parts.append(f"(…): only with shorter samples, of {span} tokens")
    if any(fit.way is None for fit in found):
        parts.append(f"{_NONE}: does not fit")
    return ". ".join(parts) + "."


def _print_blocks(heads: list[str], rows: list[tuple[str, list[str]]]) -> None:
    """The table, in as many blocks of columns as the terminal needs."""
    first = max(len("model"), *(len(name) for name, _ in rows)) if rows else len("model")
    widths = [max(len(head), *(len(cells[at]) for _, cells in rows)) for at, head in enumerate(heads)]
    at = 0
    while at < len(heads):
        until, taken = at, first
        while until < len(heads) and (until == at or taken + len(_GAP) + widths[until] <= out.width):
            taken += len(_GAP) + widths[until]
            until += 1
        if at:
            line()
        block = range(at, until)
        line(_GAP.join([f"{'model':<{first}}", *(f"{heads[place]:>{widths[place]}}" for place in block)]), "bold")
        for name, cells in rows:
            line(_GAP.join([f"{name:<{first}}", *(f"{cells[place]:>{widths[place]}}" for place in block)]))
        at = until


def _print_markdown(heads: list[str], rows: list[tuple[str, list[str]]], notes: tuple[str, ...]) -> None:
    line("| model | " + " | ".join(heads) + " |")
    line("|---|" + "---|" * len(heads))
    for name, cells in rows:
        line(f"| {name} | " + " | ".join(cells) + " |")
    for text in notes:
        line()
        line(text)
