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
from edgepeft.plan.search import Given, PlanRequest, make_plan
from edgepeft.plan.train_plan import Origin, TrainPlan
from edgepeft.spec import TrainOn
from edgepeft.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from edgepeft.data.prepare import PreparedData
    from edgepeft.spec import DataRef

Progress = Callable[[str, float | None], None]
"""Told what is being done and which share of it is done, if known."""

DEFAULT_INTENT = "balanced"
DATA_OPTIONS = ("eval_data", "eval_fraction", "train_on", "system", "map", "format", "template")
"""Options that say how the data is read."""


def build(model: str, data: Path | None, overrides: dict[str, Any], *, progress: Progress | None = None) -> TrainPlan:
    """The plan for a model, data and typed options.

    Args:
        model: a name in the store, a folder or a GGUF file.
        data: the training file; None plans by the preset's length.
        overrides: only what was typed, by option name with underscores; sizes and names as text.
        progress: told while a model is converted or data is tokenized.

    Raises:
        EdgepeftError: bad options, model or data; `DoesNotFit` when no plan fits the budget.
    """
    from edgepeft.models.store import ensure_model
    from edgepeft.profiles import find_preset

    typed = dict(overrides)
    given: dict[str, Given] = {}
    gpu, origin, where = _setting("gpu", typed)
    device = find_device(gpu)
    if not where:
        where = "the freest card here" if device.kind == "cuda" else "no NVIDIA card here"
    shown = device.name if device.present and device.kind == "cuda" else device.id
    given["gpu"] = Given(shown, origin, f"{where}: {device.name}" if shown != device.name else where)
    budget_bytes, given["budget"] = _budget(typed, device)
    intent, origin, where = _setting("intent", typed)
    preset = find_preset(intent or DEFAULT_INTENT)
    given["intent"] = Given(preset.id, origin, where or preset.description)
    reading = {name: typed.pop(name) for name in DATA_OPTIONS if name in typed}
    if data is None and reading:
        option = next(iter(reading)).replace("_", "-")
        raise UsageError(
            "says how data is read, but there is no data", where=f"--{option}", hint="Give the data file too"
        )
    entry = ensure_model(model, progress)
    request = PlanRequest(entry, preset, device, budget_bytes, overrides=typed, given=given)
    if data is not None:
        reference, prepared = _read(data, reading, Path(entry.folder), progress)
        request = msgspec.structs.replace(
            request,
            data=reference,
            lengths=SampleLengths(prepared.train, prepared.held_out),
            notes=tuple(f"{note}." for note in prepared.notes),
        )
    return make_plan(request)


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


def _read(
    data: Path, reading: dict[str, Any], model_folder: Path, progress: Progress | None
) -> tuple[DataRef, PreparedData]:
    from edgepeft.data.prepare import describe_data, prepare

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
    reference = describe_data(data, **options)

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress("tokenizing", done / total if total else None)

    return reference, prepare(reference, model_folder, progress=tell)


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
