"""What the user typed, checked before anything is searched."""

from __future__ import annotations

import math
from typing import Any, get_args

import msgspec

from edgepeft.errors import UsageError
from edgepeft.methods import METHODS
from edgepeft.plan.upkeep import check_prompts
from edgepeft.spec import Checkpointing, ComputeDtype, Keep, OptimizerName, Overlong, Precision
from edgepeft.units import parse_seconds

Pins = dict[str, Any]
"""Option name, with underscores → typed value, of the right type and in range."""

WORDS: dict[str, tuple[str, ...]] = {
    "method": tuple(METHODS),
    "precision": get_args(Precision),
    "compute_dtype": get_args(ComputeDtype),
    "overlong": get_args(Overlong),
    "checkpointing": get_args(Checkpointing),
    "keep": get_args(Keep),
    "schedule": ("cosine", "linear", "constant"),
    "optimizer": get_args(OptimizerName),
}
"""Options that take one of some words."""
COUNTS: dict[str, int] = {
    "rank": 0,
    "max_seq_len": 2,
    "micro_batch_tokens": 1,
    "samples_per_step": 1,
    "max_steps": 1,
    "loss_chunk_tokens": 1,
    "unfreeze_every": 1,
    "eval_every": 0,
    "early_stop": 0,
    "seed": 0,
}
"""Options that take a whole number, and the least that is possible."""
RANGES: dict[str, tuple[float, float, str]] = {
    "epochs": (0, 10_000, "Usual are 1 to 5"),
    "learning_rate": (0, 1, "Usual are 1e-5 to 2e-3"),
    "alpha": (0, 1e6, "Twice the rank is usual"),
    "unfreeze": (0, 1, "Give the share of the steps after which all layers train, such as 0.5"),
}
"""Options that take a number: above the first, up to the second, and what is usual."""
SWITCHES = ("deterministic",)
"""Options that are on or off."""
SHARED = ("rank", "alpha", "dropout", "targets")
"""Settings of methods that are options too."""
SHARES = ("dropout", "warmup", "eval_fraction")
"""Options that take a number from 0 to below 1."""


def check_pins(overrides: dict[str, Any]) -> Pins:
    """The typed values that the search keeps to.

    Raises:
        UsageError: one of them cannot be meant; the message names the option.
    """
    pins: Pins = {"settings": {}}
    settings = _settings(overrides.get("set", ()))
    shared = {name: settings.pop(name) for name in SHARED if name in settings}
    for name, value in {**shared, **overrides}.items():
        where = "--" + name.replace("_", "-")
        if name in WORDS:
            pins[name] = _word(where, value, WORDS[name])
        elif name in COUNTS:
            pins[name] = _count(where, value, COUNTS[name])
        elif name in RANGES:
            low, high, hint = RANGES[name]
            pins[name] = _number(where, value, low, high, hint, above=True)
        elif name in SHARES:
            pins[name] = _share(where, value)
        elif name in SWITCHES:
            pins[name] = _switch(where, value)
        elif name == "lora_plus_ratio":
            pins[name] = _number(where, value, 1, 1000, "Usual are 2 to 16; 1 switches LoRA+ off", above=False)
        elif name == "weight_decay":
            pins[name] = _number(where, value, 0, 1, "Usual are 0 to 0.1", above=False)
        elif name == "max_time":
            pins[name] = parse_seconds(str(value), where=where)
        elif name == "sample_prompt":
            pins[name] = check_prompts(where, value)
        elif name == "targets":
            pins[name] = _targets(where, value)
        elif name == "set":
            pins["settings"] = settings
        else:
            raise UsageError("unknown option", where=where)
    if "unfreeze" in pins and "unfreeze_every" in pins:
        raise UsageError(
            "says the same as --unfreeze, in other words", where="--unfreeze-every", hint="Give one of them"
        )
    return pins


def _settings(typed: Any) -> dict[str, Any]:
    """FIELD=VALUE as a person types it, or a mapping."""
    if isinstance(typed, dict):
        return dict(typed)
    found: dict[str, Any] = {}
    for text in typed:
        name, mark, value = str(text).partition("=")
        if not mark or not name.strip() or not value.strip():
            hint = "Write FIELD=VALUE, such as reduction=8; edgepeft methods show ID lists the fields"
            raise UsageError(f"{text!r} is no setting of a method", where="--set", hint=hint)
        found[name.strip().replace("-", "_")] = value.strip()
    return found


def _word(where: str, value: Any, known: tuple[str, ...]) -> str:
    word = str(value).strip().lower()
    if word not in known:
        raise UsageError(f"unknown value {value!r}", where=where, hint="Known: " + ", ".join(known))
    return word


def _count(where: str, value: Any, least: int) -> int:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{value!r} is not possible", where=where, hint=f"Give a whole number of at least {least}")
    return value


def _number(where: str, value: Any, low: float, high: float, hint: str, *, above: bool) -> float:
    number = _float(where, value)
    inside = math.isfinite(number) and (low < number if above else low <= number) and number <= high
    if not inside:
        raise UsageError(f"{value!r} is not possible", where=where, hint=hint)
    return number


def _float(where: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UsageError(f"{value!r} is no number", where=where, hint="Write it like 0.1") from None


def _share(where: str, value: Any) -> float:
    number = _float(where, value)
    if not 0 <= number < 1:
        raise UsageError(f"{value!r} is not a share", where=where, hint="Give a number from 0 to below 1")
    return number


def _switch(where: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{value!r} is neither on nor off", where=where, hint="Give it without a value, or leave it")
    return value


def _targets(where: str, value: Any) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else list(msgspec.convert(value, tuple[str, ...]))
    targets = tuple(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not targets:
        raise UsageError("no linear layer is named", where=where, hint="Give names with commas, or all-linear")
    return targets
