"""Why no plan fits a budget, and what would: other options, a larger budget, a larger card, a smaller model."""

from __future__ import annotations

import textwrap
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from edgepeft.errors import DoesNotFit, EdgepeftError, UsageError
from edgepeft.memory.calibration import base_bytes_of
from edgepeft.methods import METHODS
from edgepeft.plan.request import Candidate, PlanRequest
from edgepeft.spec import Checkpointing, Precision
from edgepeft.units import format_bytes, format_count

if TYPE_CHECKING:
    from edgepeft.plan.device import PlanDevice
    from edgepeft.plan.search import Search

_IN_THE_WAY = (
    "precision",
    "max_seq_len",
    "rank",
    "checkpointing",
    "micro_batch_tokens",
    "loss_chunk_tokens",
    "targets",
    "compute_dtype",
)
"""Options that can keep a plan from fitting, in the order in which they are named."""
_SMALLEST: dict[str, Any] = {"precision": "nf4", "rank": 4, "max_seq_len": 256}
"""What a person could still ask for by hand, when a preset does not go so low."""
_BUDGET_ROOM = 1.01
"""A budget that is named is this much above what is needed."""
_SHOWN_LENGTH = 1024
"""Tokens that a smaller model should take whole before it is proposed; the longest sample where that is shorter."""
_MODES: dict[Checkpointing, str] = {
    "layer": "checkpointing",
    "none": "no checkpointing",
    "offload": "layers' inputs in RAM",
}
_MARK = "  • "


class Way(msgspec.Struct, frozen=True):
    """One thing that would help."""

    kind: Literal["option", "budget", "card", "model"]
    text: str
    """For a person: a sentence without a full stop."""
    names: tuple[str, ...] = ()
    """What it names: options as one types them, ids of cards or of models."""
    bytes: int | None = None
    """The budget that it names."""


class Refusal(msgspec.Struct, frozen=True):
    """Why a request has no plan, in figures."""

    model: str
    device: str
    budget_bytes: int
    budget_why: str
    needed_bytes: int
    """Peak of the smallest plan that was tried."""
    base_bytes: int
    """What the frozen base takes of it."""
    precision: Precision
    rank: int
    max_seq_len: int
    checkpointing: Checkpointing
    ways: tuple[Way, ...]
    """What would help; empty when nothing does."""


class NothingFits(DoesNotFit):
    """No plan fits.

    Args:
        search: the search in which nothing fits.
    """

    def __init__(self, search: Search) -> None:
        self._search = search
        self._smallest = search.smallest(search.least_length())
        memory = search.count(self._smallest).memory
        self.memory = memory
        """What the smallest plan that was tried would hold."""
        self._needed = memory.peak_bytes
        self._base = base_bytes_of(memory.peak)
        request, found = search.request, self._smallest
        budget = request.budget_bytes
        options = _options(request, search)
        ways = [way.text for way in options] + [f"a budget of {format_bytes(self._needed * _BUDGET_ROOM)}"]
        if self._base > budget / 2:
            ways.append(f"a smaller model: this base alone takes {format_bytes(self._base)} in {found.precision}")
        super().__init__(
            f"{request.entry.name} needs {format_bytes(self._needed)} at the least ({found.precision}, "
            f"{rank_words(found.rank)}{found.max_seq_len:,} tokens, checkpointing {found.checkpointing}), "
            f"{format_bytes(max(0, self._needed - budget))} more than the budget of {format_bytes(budget)}",
            hint="What would help: " + "; ".join(ways),
        )
        self._options = options

    @cached_property
    def refusal(self) -> Refusal:
        """The refusal with everything that would help; looking for it takes a moment.

        Raises:
            BadInput: a profile of a card or of a model cannot be read.
        """
        search, found = self._search, self._smallest
        request = search.request
        given = request.given.get("budget")
        return Refusal(
            model=request.entry.name,
            device="the CPU" if request.device.kind == "cpu" else request.device.name,
            budget_bytes=request.budget_bytes,
            budget_why=given.why if given is not None else request.device.budget_why,
            needed_bytes=self._needed,
            base_bytes=self._base,
            precision=found.precision,
            rank=found.rank,
            max_seq_len=found.max_seq_len,
            checkpointing=found.checkpointing,
            ways=(
                *self._options,
                *_by_hand(request, search),
                *_budgets(request.device, request.budget_bytes, round(self._needed * _BUDGET_ROOM)),
                *_cards(request, search, self._needed),
                *_models(request, search),
            ),
        )

    def lines(self, prefix: str, width: int) -> list[str]:
        """What went wrong as a paragraph, and each thing that would help on a line of its own."""
        try:
            told = self.refusal
        except EdgepeftError:
            # Nothing more can be said when a profile is damaged.
            return super().lines(prefix, width)
        budget, needed = format_bytes(told.budget_bytes), format_bytes(told.needed_bytes)
        why = f" ({told.budget_why})" if told.budget_why else ""
        over = format_bytes(max(0, told.needed_bytes - told.budget_bytes))
        too_large = told.base_bytes > told.budget_bytes
        sentences = (
            f"{told.model} does not fit {told.device}: the budget is {budget}{why}",
            f"Its base alone takes {format_bytes(told.base_bytes)} in {told.precision}"
            + (", more than all of that" if too_large else ""),
            f"{'Even with' if told.rank <= 8 else 'With'} {rank_words(told.rank)}{told.max_seq_len:,} tokens and "
            f"{_MODES[told.checkpointing]} a run needs {needed}, {over} "
            "more than the budget",
        )
        lines = _wrapped(". ".join(sentences) + ".", width, prefix, "")
        if told.ways:
            lines.append("What would help:")
            for way in told.ways:
                lines += _wrapped(way.text, width, _MARK, " " * len(_MARK))
        return lines


def _attempt(request: PlanRequest, **changes: Any) -> Candidate | None:
    from edgepeft.plan.quality import QualitySearch

    try:
        return QualitySearch(msgspec.structs.replace(request, **changes)).find()
    except UsageError:
        # Such as a rank or a target that another model does not have.
        return None


def _options(request: PlanRequest, search: Search) -> list[Way]:
    """Options that the user typed and that alone keep a plan from fitting."""
    ways = []
    for name in _IN_THE_WAY:
        if name not in search.pins:
            continue
        rest = {key: value for key, value in request.overrides.items() if key != name}
        found = _attempt(request, overrides=rest)
        if found is not None:
            option = "--" + name.replace("_", "-")
            with_what = getattr(found, name, request.device.compute_dtype if name == "compute_dtype" else "all-linear")
            shown = f"{with_what:,}" if isinstance(with_what, int) else with_what
            ways.append(Way("option", f"leaving out {option} (it fits with {shown})", (option,)))
    return ways


def _by_hand(request: PlanRequest, search: Search) -> list[Way]:
    """Smaller values than the preset goes to, where they are enough."""
    dense = METHODS[search.method_id].needs_dense_base
    free = [name for name in _SMALLEST if name not in search.pins and not (dense and name == "precision")]
    for names in ([name] for name in free):
        way = _way_by_hand(request, names)
        if way is not None:
            return [way]
    way = _way_by_hand(request, free)
    return [way] if way is not None else []


def _way_by_hand(request: PlanRequest, names: list[str]) -> Way | None:
    values = {name: _SMALLEST[name] for name in names}
    if _attempt(request, overrides={**request.overrides, **values}) is None:
        return None
    options = tuple(f"--{name.replace('_', '-')} {value}" for name, value in values.items())
    return Way("option", f"less than the preset asks for: {' '.join(options)}", options)


def _budgets(device: PlanDevice, budget_bytes: int, wanted_bytes: int) -> list[Way]:
    """A larger budget, as far as the device has it."""
    if wanted_bytes > device.total_bytes:
        return []
    text = f"a budget of {format_bytes(wanted_bytes)}"
    if wanted_bytes <= device.budget_bytes:
        text += f": {_place(device)} has {format_bytes(device.budget_bytes)} to give"
        if budget_bytes < device.budget_bytes:
            text += ", leave out --budget"
    else:
        text += f": {_place(device)} has {format_bytes(device.total_bytes)} in all, of which other programs hold a part"
    return [Way("budget", text, bytes=wanted_bytes)]


def _place(device: PlanDevice) -> str:
    return "this machine" if device.kind == "cpu" else "the card"


def _cards(request: PlanRequest, search: Search, needed_bytes: int) -> list[Way]:
    """The smallest card that would hold the run, and the smallest of those on which it gives up least."""
    from edgepeft.plan.device import profile_device
    from edgepeft.profiles import load_gpus

    if request.device.kind == "cpu":
        return []
    larger = [card for card in map(profile_device, load_gpus().values()) if card.budget_bytes >= needed_bytes]
    found: list[tuple[str, Candidate]] = []
    best: tuple[str, Candidate] | None = None
    tried: set[tuple[int, object]] = set()
    for card in _by_size(larger):
        # Of cards that are alike to a plan one is enough.
        kind = (card.budget_bytes, card.capability)
        candidate = _attempt(request, device=card, budget_bytes=card.budget_bytes) if kind not in tried else None
        tried.add(kind)
        if candidate is None:
            continue
        whole = candidate.max_seq_len == search.target_length() and candidate.rank == search.ranks[0]
        if best is None or (candidate.max_seq_len, candidate.rank) > (best[1].max_seq_len, best[1].rank):
            best = card.id, candidate
        if whole or not found:
            found.append((card.id, candidate))
        if whole:
            break
    if best is not None and best not in found:
        found.append(best)
    if not found:
        return [Way("card", f"a card with more than {format_bytes(needed_bytes)} to give; no profile describes one")]
    shown = " or ".join(f"{name} ({_how(candidate)})" for name, candidate in found)
    return [Way("card", f"a card with more memory: {shown}", tuple(name for name, _ in found))]


def _by_size(cards: list[PlanDevice]) -> list[PlanDevice]:
    """Smaller cards first; of those that differ by less than a tenth, the ones that people have at home."""
    ordered: list[PlanDevice] = []
    left = sorted(cards, key=lambda card: card.total_bytes)
    while left:
        alike = [card for card in left if card.total_bytes < 1.1 * left[0].total_bytes]
        ordered += sorted(alike, key=lambda card: (not card.id.startswith("rtx-"), "laptop" in card.id))
        left = left[len(alike) :]
    return ordered


def _models(request: PlanRequest, search: Search) -> list[Way]:
    """The largest described model that this device takes."""
    from edgepeft.models.described import describe_model, load_models

    shape = request.entry.shape
    smaller = [model for model in load_models().values() if model.parameters < shape.parameters]
    shortened: tuple[str, Candidate] | None = None
    for model in sorted(smaller, key=lambda model: model.parameters, reverse=True):
        found = _attempt(request, entry=describe_model(model), config=model.config)
        if found is None:
            continue
        if found.max_seq_len >= min(search.target_length(), model.shape.context_length, _SHOWN_LENGTH):
            return [_model_way(model.id, model.parameters, found)]
        shortened = shortened or (model.id, found)
    if shortened is not None:
        return [_model_way(shortened[0], None, shortened[1])]
    return []


def _model_way(name: str, parameters: int | None, found: Candidate) -> Way:
    size = f" ({format_count(parameters)} parameters)" if parameters is not None else ""
    return Way("model", f"a smaller model: the largest that fits here is {name}{size}, {_how(found)}", (name,))


def _how(found: Candidate) -> str:
    return f"{found.precision}, {rank_words(found.rank)}{found.max_seq_len:,} tokens"


def rank_words(rank: int) -> str:
    """The rank in a list of values; nothing where memory does not decide one."""
    return f"rank {rank}, " if rank else ""


def _wrapped(text: str, width: int, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text,
        max(40, width),
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
