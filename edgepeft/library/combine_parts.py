"""The adapters of a combination as they are named on the command line: `a=0.7`, or `a:1200` samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec

from edgepeft.errors import BadInput, UsageError
from edgepeft.library.lora_pairs import LoraPair, read_lora_pairs
from edgepeft.library.store import AdapterFolder, resolve_adapter, split_reference, weights_digest

TRAIN_SAMPLES = "train_samples"
"""The metric of a card that holds how many distinct samples the adapter was trained on."""


class Part(msgspec.Struct, frozen=True):
    """One adapter that goes into a combination."""

    adapter: AdapterFolder
    sha256: str
    """`sha256:…` of its weights."""
    weight: float
    """What its update is multiplied with."""
    pairs: dict[str, LoraPair]
    """Its updates by module path."""
    samples: int | None = None
    """Training samples that the weight was taken from."""


def weighted_parts(texts: Sequence[str]) -> tuple[list[Part], list[str]]:
    """The parts of `NAME=0.7 NAME@v2 FOLDER=-1`, and notes about them; without a weight it is 1.

    The weights of an adapter that is named more than once are added up.

    Raises:
        UsageError: a weight is no finite number, or is 0.
        BadInput: there is no such adapter, or it is no plain LoRA.
    """
    weights: dict[Path, list[float]] = {}
    adapters: dict[Path, AdapterFolder] = {}
    for text in texts:
        reference, said = split_reference(text, "=")
        weight = 1.0 if said is None else _weight(said, text)
        adapter = resolve_adapter(reference)
        place = adapter.path.resolve()
        adapters.setdefault(place, adapter)
        weights.setdefault(place, []).append(weight)
    parts, notes = [], []
    for place, adapter in adapters.items():
        total = math.fsum(weights[place])
        if len(weights[place]) > 1:
            times = {2: "twice", 3: "three times"}.get(len(weights[place]), f"{len(weights[place])} times")
            notes.append(f"{adapter.reference} is named {times}: its weights add up to {total:.6g}.")
        if total == 0:
            raise UsageError(
                "has weight 0, so it would add nothing", where=adapter.reference, hint="Leave it out, or weigh it"
            )
        parts.append(Part(adapter, weights_digest(adapter), total, read_lora_pairs(adapter)))
    if len(parts) > 1 and abs(math.fsum(part.weight for part in parts)) < 1e-9:
        notes.append("The weights add up to 0: the result is a difference of adapters.")
    return parts, notes


def averaged_parts(texts: Sequence[str], by: str) -> list[Part]:
    """The parts of a federated average (McMahan et al. 2017, arXiv 1602.05629): weights that add up to 1.

    Args:
        texts: `NAME`, `NAME@v2` or a folder; with `:1200` behind it, that many samples.
        by: `samples` weighs each adapter by its share of all training samples: those that are named, else those in its
            card; `equal` weighs all alike.

    Raises:
        UsageError: `by` is unknown, a count is no whole number above 0, or an adapter is named twice.
        BadInput: there is no such adapter, it is no plain LoRA, or nobody tells how many samples it was trained on.
    """
    if by not in ("samples", "equal"):
        raise UsageError(f"unknown weighting {by!r}", where="--by", hint="Known: samples, equal")
    found: dict[Path, tuple[AdapterFolder, int | None]] = {}
    for text in texts:
        reference, said = split_reference(text, ":")
        count = None if said is None else _count(said, text)
        if count is not None and by == "equal":
            raise UsageError(
                f"{text!r} has a number of samples, and --by equal uses none", where="--by", hint="Use --by samples"
            )
        adapter = resolve_adapter(reference)
        place = adapter.path.resolve()
        if place in found:
            raise UsageError(
                "is named twice, and each adapter counts once", where=adapter.reference, hint="Name it once"
            )
        found[place] = (adapter, _samples(adapter, count) if by == "samples" else None)
    total = sum(count or 1 for _, count in found.values())
    return [
        Part(adapter, weights_digest(adapter), (count or 1) / total, read_lora_pairs(adapter), count)
        for adapter, count in found.values()
    ]


def _weight(said: str, text: str) -> float:
    try:
        weight = float(said)
    except ValueError:
        raise UsageError(f"{said!r} is not a weight", where=text, hint="Write for example a=0.7 b=0.3") from None
    if not math.isfinite(weight):
        raise UsageError(f"a weight of {said} is not possible", where=text, hint="Write for example a=0.7 b=0.3")
    return weight


def _count(said: str, text: str) -> int:
    if not said.isascii() or not said.isdecimal() or int(said) == 0:
        raise UsageError(f"{said!r} is not a number of samples", where=text, hint="Write for example a:1200")
    return int(said)


def _samples(adapter: AdapterFolder, count: int | None) -> int:
    if count is not None:
        return count
    known = adapter.card.metrics.get(TRAIN_SAMPLES, 0.0) if adapter.card is not None else 0.0
    if known < 1:
        lacks = "has no card" if adapter.card is None else "has a card without its number of training samples"
        name = adapter.name or str(adapter.path)
        raise BadInput(lacks, where=adapter.reference, hint=f"Write it as {name}:1200, or use --by equal")
    return int(known)
