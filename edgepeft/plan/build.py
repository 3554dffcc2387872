"""From what the user typed to a plan: settings, device, model and data are found, then the search runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import msgspec

from edgepeft.errors import UsageError
from edgepeft.plan.device import PlanDevice, check_budget, find_device
from edgepeft.plan.lengths import SampleLengths
from edgepeft.plan.request import Given, PlanRequest
from edgepeft.plan.sources import Sources, stamp
from edgepeft.plan.train_plan import Origin, TrainPlan
from edgepeft.spec import TrainOn
from edgepeft.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from edgepeft.library.parent import Parent
    from edgepeft.models.described import DescribedModel, ModelProfile
    from edgepeft.models.store import ModelEntry
    from edgepeft.spec import DataRef

Progress = Callable[[str, float | None], None]
"""Told what is being done and which share of it is done, if known."""

DEFAULT_INTENT = "balanced"
DATA_OPTIONS = ("eval_data", "eval_fraction", "train_on", "system", "map", "format", "template")
"""Options that say how the data is read."""


def build(
    model: str,
    data: Path | None,
    overrides: dict[str, Any],
    *,
    progress: Progress | None = None,
    verify: bool = False,
) -> TrainPlan:
    """The plan for a model, data and typed options.

    Args:
        model: as `make_request` takes it, like `data` and `overrides`.
        data: the training file.
        overrides: what was typed.
        progress: told while a model is converted, data is tokenized or a step is simulated.
        verify: simulate the plan's training step, and choose again where that needs more than the budget.

    Raises:
        EdgepeftError: bad options, model or data; `DoesNotFit` when no plan fits the budget.
    """
    from edgepeft.plan.simulated import plan_for
    from edgepeft.plan.verify import Simulator

    request = make_request(model, data, overrides, progress=progress)

    def say(what: str) -> None:
        if progress is not None:
            progress(what, None)

    with Simulator(say) as simulator:
        return plan_for(request, simulator.dry_run, verify=verify)


def make_request(
    model: str,
    data: Path | None,
    overrides: dict[str, Any],
    *,
    progress: Progress | None = None,
    sources: Sources | None = None,
) -> PlanRequest:
    """Everything that a plan for a model, data and typed options is made from.

    Args:
        model: a name in the store, a folder or a GGUF file; a model that is not on this disk by its profile's id or
            its name on the hub.
        data: the training file; None plans by the preset's length.
        overrides: only what was typed, by option name with underscores; sizes and names as text.
        progress: told while a model is converted or data is tokenized.
        sources: what was read for the plans before this one.

    Raises:
        EdgepeftError: bad options, model or data.
    """
    from edgepeft.profiles import find_preset

    sources = sources or Sources()
    typed = dict(overrides)
    given: dict[str, Given] = {}
    gpu, origin, where = _setting("gpu", typed)
    device = sources.get(("device", gpu), lambda: find_device(gpu))
    if not where:
        where = "the freest card here" if device.kind == "cuda" else "no NVIDIA card here"
    shown = device.name if device.present and device.kind == "cuda" else device.id
    given["gpu"] = Given(shown, origin, f"{where}: {device.name}" if shown != device.name else where)
    budget_bytes, given["budget"] = _budget(typed, device)
    intent, origin, where = _setting("intent", typed)
    preset_id = intent or DEFAULT_INTENT
    preset = sources.get(("preset", preset_id), lambda: find_preset(preset_id))
    given["intent"] = Given(preset.id, origin, where or preset.description)
    reading = {name: typed.pop(name) for name in DATA_OPTIONS if name in typed}
    if data is None and reading:
        option = next(iter(reading)).replace("_", "-")
        raise UsageError(
            "says how data is read, but there is no data", where=f"--{option}", hint="Give the data file too"
        )
    base = sources.get(("base", model), lambda: find_base(model, progress))
    config, told = _described(base)
    parent = _parent(typed.pop("from_", None), base)
    if parent is not None:
        typed, told = parent.take_over(typed, base.shape), told + parent.notes
    request = PlanRequest(base, preset, device, budget_bytes, overrides=typed, given=given, notes=told, config=config)
    request = msgspec.structs.replace(request, parent=parent)
    if data is not None:
        request = _with_data(request, data, reading, progress, sources)
    return request


def _setting(name: str, typed: dict[str, Any]) -> tuple[str | None, Origin, str]:
    """A setting's value, its origin and where it was said: typed < environment < config.toml, or None."""
    from edgepeft.settings import settings

    if name in typed:
        return str(typed.pop(name)), "user", "as typed"
    value = getattr(settings(), name)
    if value is None:
        return None, "auto", ""
    variable = f"EDGEPEFT_{name.upper()}"
    return str(value), "config", f"set by {variable}" if os.environ.get(variable) else "set in config.toml"


def _budget(typed: dict[str, Any], device: PlanDevice) -> tuple[int, Given]:
    text, origin, where = _setting("budget", typed)
    if text is None:
        return device.budget_bytes, Given(format_bytes(device.budget_bytes), "auto", device.budget_why)
    budget_bytes = parse_bytes(text, where="--budget" if origin == "user" else "budget")
    check_budget(budget_bytes, device)
    return budget_bytes, Given(format_bytes(budget_bytes), origin, where)


def find_base(model: str, progress: Progress | None = None) -> ModelEntry | DescribedModel:
    """The model that a name means: one on this disk, else one that a profile describes.

    Raises:
        BadInput: there is neither, or it cannot be used.
        DiskProblem: the store's disk is full, or may not be written.
    """
    from edgepeft.models.described import describe_model, described_model, near_models
    from edgepeft.models.references import NotOnDisk
    from edgepeft.models.store import ensure_model

    try:
        return ensure_model(model, progress)
    except NotOnDisk as error:
        profile = described_model(model)
        if profile is not None:
            return describe_model(profile)
        near = [] if model.startswith((".", "~")) or Path(model).is_absolute() else near_models(model)
        if not near:
            raise
        hint = f"{error.hint}. Without it you can plan for {' or '.join(near)}"
        raise NotOnDisk(error.what, where=error.where, hint=hint) from error


def _parent(reference: str | None, base: ModelEntry | DescribedModel) -> Parent | None:
    """The adapter that is to be continued.

    Raises:
        BadInput: there is none of this name, or it cannot be continued over this base.
    """
    from edgepeft.library.parent import find_parent
    from edgepeft.models.described import DescribedModel

    if reference is None:
        return None
    if isinstance(base, DescribedModel):
        raise UsageError(
            f"{base.profile.name} is not on this disk, so nothing tells whether the adapter belongs to it",
            where="--from",
            hint="Add the model first, or leave --from out",
        )
    return find_parent(reference, base)


def _described(base: ModelEntry | DescribedModel) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """The config and the notes of a model that is only described: a dry run finds no folder to read."""
    from edgepeft.models.described import DescribedModel, how_to_get

    if not isinstance(base, DescribedModel):
        return None, ()
    profile = base.profile
    what = f"{profile.name} is not on this disk: the plan is made from its profile, and cannot be trained yet."
    left_out = f" Counted is {profile.note}." if profile.note else ""
    return profile.config, (f"{what}{left_out} {how_to_get(profile)}.",)


def _with_data(
    request: PlanRequest, data: Path, reading: dict[str, Any], progress: Progress | None, sources: Sources
) -> PlanRequest:
    """The request with the lengths of the data's samples, from the model's tokenizer or estimated."""
    from edgepeft.data.prepare import describe_data

    options: dict[str, Any] = {
        "format": reading.get("format"),
        "columns": parse_map(reading.get("map", [])),
        "system": reading.get("system"),
        "template": reading.get("template"),
    }
    if "train_on" in reading:
        options["train_on"] = _train_on(reading["train_on"])
    if "eval_data" in reading:
        options["eval_path"] = Path(reading["eval_data"])
    if "eval_fraction" in reading:
        options["eval_fraction"] = _fraction(reading["eval_fraction"])
    files = tuple(stamp(path) for path in (data, options.get("eval_path"), options["template"]))
    spelt = repr(sorted(options.items()))
    reference = sources.get(("data", files, spelt), lambda: describe_data(data, **options))
    key = ("lengths", files, spelt, request.entry.name, request.entry.fingerprint)
    lengths, notes = sources.get(key, lambda: _lengths(request.entry, reference, progress))
    told = tuple(f"{note}." for note in notes)
    return msgspec.structs.replace(request, data=reference, lengths=lengths, notes=request.notes + told)


def _lengths(
    base: ModelEntry | DescribedModel, reference: DataRef, progress: Progress | None
) -> tuple[SampleLengths, tuple[str, ...]]:
    from edgepeft.data.prepare import prepare
    from edgepeft.models.described import DescribedModel

    described = isinstance(base, DescribedModel)

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress("estimating lengths" if described else "tokenizing", done / total if total else None)

    if isinstance(base, DescribedModel):
        return _guess(base.profile, reference, tell)
    prepared = prepare(reference, Path(base.folder), progress=tell)
    return SampleLengths(prepared.train, prepared.held_out), prepared.notes


def _guess(
    profile: ModelProfile, data: DataRef, tell: Callable[[int, int], None]
) -> tuple[SampleLengths, tuple[str, ...]]:
    from edgepeft.data.length_guess import guess_lengths
    from edgepeft.models.described import find_tokenizer_profile

    tokenizer = find_tokenizer_profile(profile.tokenizer)
    guessed = guess_lengths(data, tokenizer.tokens, sample_tokens=profile.sample_tokens, progress=tell)
    note = (
        "Lengths are estimated from characters, as the model's tokenizer is not here: in English some 5 % off, in "
        "other languages up to 20 %"
    )
    return SampleLengths(guessed.train, guessed.held_out, estimated=True), (note, *guessed.notes)


def parse_map(pairs: list[str]) -> dict[str, str]:
    """`FIELD=COLUMN` pairs as field → column.

    Raises:
        UsageError: one of them has no `=`, or an empty side.
    """
    columns: dict[str, str] = {}
    for pair in pairs:
        field, equals, column = (part.strip() for part in pair.partition("="))
        if not equals or not field or not column:
            raise UsageError(f"cannot read {pair!r}", where="--map", hint="Write FIELD=COLUMN, such as prompt=question")
        columns[field] = column
    return columns


def _train_on(value: str) -> str:
    known = get_args(TrainOn)
    if value not in known:
        raise UsageError(f"unknown value {value!r}", where="--train-on", hint="Known: " + ", ".join(known))
    return value


def _fraction(value: float) -> float:
    if not 0 <= value < 1:
        raise UsageError(f"{value!r} is not a share", where="--eval-fraction", hint="Give a number from 0 to below 1")
    return value
