"""Which models fit which cards, and how: one search for each pair, without data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec

from edgepeft.errors import UsageError
from edgepeft.plan.device import PlanDevice, find_device
from edgepeft.plan.quality import QualitySearch
from edgepeft.plan.request import PlanRequest
from edgepeft.profiles import Preset, PresetValue
from edgepeft.spec import Precision

if TYPE_CHECKING:
    from edgepeft.models.described import DescribedModel
    from edgepeft.models.store import ModelEntry

CARDS = (
    "rtx-3060-laptop-6gb",
    "rtx-4060-8gb",
    "rtx-3080-10gb",
    "rtx-3060-12gb",
    "rtx-4060-ti-16gb",
    "rtx-4000-ada-20gb",
    "rtx-4090-24gb",
    "rtx-5090-32gb",
    "rtx-6000-ada-48gb",
)
"""One card of each usual size."""
MODELS = (
    "smollm2-135m",
    "qwen2.5-0.5b",
    "llama-3.2-1b",
    "qwen2.5-1.5b",
    "gemma-2-2b",
    "llama-3.2-3b",
    "qwen3-4b",
    "mistral-7b-v0.3",
    "llama-3.1-8b",
    "gemma-2-9b",
    "mistral-nemo-12b",
    "qwen2.5-14b",
    "mistral-small-24b",
    "gemma-2-27b",
    "qwen2.5-32b",
    "llama-65b",
    "llama-3.1-70b",
)
"""A model of each usual size, mostly the one that people start from."""
ALL = "all"
"""What stands for every model that a profile describes."""


class Way(msgspec.Struct, frozen=True):
    """How a model fits a card."""

    precision: Precision
    rank: int
    max_seq_len: int
    """Tokens of the longest sample; fewer than asked for where memory limits it."""
    least_bytes: int
    """What a run needs at its peak with the leanest layout; a plan takes more where that makes it faster."""


class Fit(msgspec.Struct, frozen=True):
    """One model on one card."""

    model: str
    parameters: int
    card: str
    card_bytes: int
    """All memory of the card."""
    budget_bytes: int
    """What a run may use of it."""
    way: Way | None
    """None when no plan fits."""
    shortened: bool
    """Whether only samples shorter than asked for fit."""


def find_cards(names: Sequence[str]) -> list[PlanDevice]:
    """The devices of these names, as `--gpu` understands them; the usual sizes when there are none.

    Raises:
        UsageError: nothing of that name.
        DeviceUnusable: a card does not tell its memory.
    """
    return [find_device(name) for name in _each(names)] if names else _usual_cards()


def find_bases(names: Sequence[str]) -> list[ModelEntry | DescribedModel]:
    """The models of these names: in the store, or described by a profile; the usual sizes when there are none.

    Raises:
        UsageError: nothing of that name; the nearest ones are named.
        BadInput: a profile cannot be read.
    """
    from edgepeft.models.described import describe_model, find_model_profile, load_models
    from edgepeft.models.store import list_models

    described = load_models()
    wanted = list(_each(names))
    if wanted == [ALL]:
        return [describe_model(model) for model in sorted(described.values(), key=lambda model: model.parameters)]
    stored = {entry.name: entry for entry in list_models()} if wanted else {}
    found = wanted or [name for name in MODELS if name in described]
    return [stored.get(name) or describe_model(find_model_profile(name, where="--models")) for name in found]


def fit_all(
    bases: Iterable[ModelEntry | DescribedModel], cards: Sequence[PlanDevice], preset: Preset, max_seq_len: int
) -> list[Fit]:
    """Every model on every card, models outermost.

    Args:
        bases: the models.
        cards: the devices, with what a run may use of each.
        preset: what plans start from.
        max_seq_len: tokens of the longest sample; it is lowered before a model is given up.

    Raises:
        UsageError: the length is not possible.
    """
    if max_seq_len < 2:
        raise UsageError(f"{max_seq_len} is not possible", where="--seq-len", hint="Give a whole number of at least 2")
    length = PresetValue(max_seq_len, "as typed")
    asked = msgspec.structs.replace(preset, max_seq_len=length)
    return [_fit(base, card, asked) for base in bases for card in cards]


def _fit(base: ModelEntry | DescribedModel, card: PlanDevice, preset: Preset) -> Fit:
    search = QualitySearch(PlanRequest(base, preset, card, card.budget_bytes))
    found = search.find()
    way = None
    if found is not None:
        way = Way(
            precision=found.precision,
            rank=found.rank,
            max_seq_len=found.max_seq_len,
            least_bytes=search.count(found).memory.peak_bytes,
        )
    return Fit(
        model=base.name,
        parameters=base.shape.parameters,
        card=card.id if not card.present or card.kind == "cpu" else card.name,
        card_bytes=card.total_bytes,
        budget_bytes=card.budget_bytes,
        way=way,
        shortened=found is not None and found.max_seq_len < search.target_length(),
    )


def _usual_cards() -> list[PlanDevice]:
    from edgepeft.plan.device import profile_device
    from edgepeft.profiles import load_gpus

    described = load_gpus()
    return [profile_device(described[name]) for name in CARDS if name in described]


def _each(names: Sequence[str]) -> Iterable[str]:
    """Names that were given one by one or with commas."""
    return [name.strip() for text in names for name in text.split(",") if name.strip()]
