"""The rows of the Plan screen's table: every choice with its value, origin and reason, and what may be put there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from edgepeft.plan.train_plan import TrainPlan

NOT_SET = "–"
"""Shown where a plan leaves something out."""
_READ_ONLY = ("time",)
_FIRST = ("gpu", "budget", "intent")
"""What a plan's choices begin with."""
_LORA = {"rank", "alpha", "targets", "dropout"}
"""Options that are settings of a method, of LoRA above all."""
_OWN_WORDS = ("gpu", "intent")
"""Options whose words are read from profiles and from the machine."""


class ChoiceRow(msgspec.Struct, frozen=True):
    """One line of the table."""

    what: str
    value: str
    origin: str
    """`auto`, `preset`, `config` or `user`; empty for what the plan leaves out."""
    why: str
    editable: bool = True
    words: tuple[str, ...] = ()
    """All that it may be; empty where it is typed freely."""
    text: str = ""
    """What an editor begins with."""
    help: str = ""
    """What it is, in one line."""
    mine: bool = False
    """Whether the user set it here."""


def choice_rows(plan: TrainPlan, values: dict[str, str]) -> tuple[ChoiceRow, ...]:
    """The plan's choices, and behind them what could be set besides.

    Args:
        plan: the plan.
        values: what the user set.
    """
    from edgepeft.methods import METHODS, id_of
    from edgepeft.plan.options import OPTIONS, Option, method_options

    method = id_of(plan.spec.recipe.method)
    settings = method_options(method)
    known = {**settings, **OPTIONS}
    rows = []
    shown = {choice.what for choice in plan.choices}
    for choice in plan.choices:
        if choice.what == "rank" and "method" not in shown:
            origin = "user" if "method" in values else "auto"
            rows.append(_row(known["method"], method, origin, f"{METHODS[method].adds}; the usual method", values))
        option = known.get(choice.what, Option(choice.what, "text"))
        rows.append(_row(option, choice.value, choice.origin, choice.why, values))
    decided = {row.what for row in rows}
    lora_only = _LORA - set(settings)
    for name, option in known.items():
        if name not in decided | lora_only | {"set"}:
            why = option.help or f"a setting of {method}"
            rows.append(_row(option, values.get(name, NOT_SET), "user" if name in values else "", why, values))
    return tuple(rows)


def bare_rows() -> tuple[ChoiceRow, ...]:
    """What may be set where there is no plan yet."""
    from edgepeft.plan.options import OPTIONS

    names = [*_FIRST, *(name for name in OPTIONS if name not in (*_FIRST, "set"))]
    return tuple(_row(OPTIONS[name], NOT_SET, "", OPTIONS[name].help, {}) for name in names)


def overlaid(rows: tuple[ChoiceRow, ...], values: dict[str, str]) -> tuple[tuple[ChoiceRow, ...], frozenset[str]]:
    """The rows of a plan with what the user has set since, and the names of those that wait for a plan."""
    found, pending = [], set()
    for row in rows:
        mine = values.get(row.what)
        if mine is not None and (not row.mine or mine != row.text):
            pending.add(row.what)
            row = msgspec.structs.replace(row, value=mine, text=mine, origin="user", why=row.help or row.why)
        elif mine is None and row.mine:
            pending.add(row.what)
        found.append(row)
    return tuple(found), frozenset(pending)


def _row(option: object, value: str, origin: str, why: str, values: dict[str, str]) -> ChoiceRow:
    from edgepeft.plan.options import Option

    assert isinstance(option, Option)
    name = option.name
    plain = "" if value in (NOT_SET, "none") or option.kind == "list" else value
    text = values.get(name, plain.replace(",", "") if option.kind == "count" else plain)
    return ChoiceRow(name, value, origin, why, name not in _READ_ONLY, option.words, text, option.help, name in values)


def settable(method: str) -> frozenset[str]:
    """What may be set beside a method."""
    from edgepeft.plan.options import OPTIONS, method_options

    settings = set(method_options(method))
    return frozenset({*OPTIONS, *settings} - (_LORA - settings))


def words_for(row: ChoiceRow) -> tuple[tuple[str, str], ...]:
    """What a row may be, as (word, what it means); reads profiles and the machine where the words come from there."""
    if row.what == "intent":
        from edgepeft.profiles import load_presets

        return tuple((preset.id, preset.description) for preset in load_presets().values())
    if row.what == "gpu":
        return _devices()
    if row.what == "method":
        from edgepeft.methods import METHODS

        return tuple((name, METHODS[name].adds) for name in row.words)
    return tuple((word, "") for word in row.words)


def has_words(row: ChoiceRow) -> bool:
    """Whether it is chosen from a list."""
    return bool(row.words) or row.what in _OWN_WORDS


def _devices() -> tuple[tuple[str, str], ...]:
    from edgepeft.hardware.nvml import read_gpus
    from edgepeft.profiles import load_gpus
    from edgepeft.units import format_gib

    here = [(card.uuid, f"{card.name}, in this machine") for card in read_gpus()]
    profiles = [
        (profile.id, f"{profile.name}, {format_gib(profile.memory_bytes, digits=0)}")
        for profile in load_gpus().values()
    ]
    return (*here, ("cpu", "this machine's processor"), *profiles)
