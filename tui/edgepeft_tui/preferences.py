"""What the Settings screen shows: settings with their origin, folders with their sizes, and what runs here."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata

import msgspec

from edgepeft.units import format_bytes

_MEANINGS = {
    "theme": "colours of this program",
    "glyphs": "signs that are drawn",
    "spacing": "room between things",
    "budget": "memory that a run may use",
    "gpu": "card to plan and train on",
    "intent": "what a plan is good at",
    "co2_grams_per_kwh": "grams of CO₂ of a kWh where you are",
}
"""Settings in the order in which they are shown."""
_USUAL = {
    "theme": "edgepeft",
    "glyphs": "what the terminal shows",
    "spacing": "roomy",
    "budget": "what is free, less a margin",
    "gpu": "the freest card, or the CPU",
    "intent": "balanced",
}
_PACKAGES = ("textual", "torch", "transformers", "bitsandbytes", "accelerate", "safetensors", "gguf", "peft")


class Setting(msgspec.Struct, frozen=True):
    """One setting."""

    key: str
    value: str | None
    """None where nothing was said."""
    usual: str
    """What nothing means."""
    origin: str
    meaning: str


class Place(msgspec.Struct, frozen=True):
    """A folder or a file."""

    name: str
    path: str
    size: str
    """Or what kept it from being read."""
    trouble: bool = False


def read_settings() -> tuple[Setting, ...]:
    """The settings in force, but for the keys.

    Raises:
        BadInput: config.toml is not valid.
    """
    from edgepeft.settings import WORLD_CO2_GRAMS_PER_KWH, shown_settings

    usual = _USUAL | {"co2_grams_per_kwh": f"{WORLD_CO2_GRAMS_PER_KWH:g}, the world's average"}
    found = {shown.key: shown for shown in shown_settings()}
    return tuple(
        Setting(key, found[key].value, usual[key], found[key].origin, meaning) for key, meaning in _MEANINGS.items()
    )


def read_keys() -> dict[str, str]:
    """The keys that config.toml gives to actions.

    Raises:
        BadInput: config.toml is not valid.
    """
    from edgepeft.settings import stored_settings

    return dict(stored_settings().keys)


def read_places() -> Iterator[Place]:
    """What is where, one after the other: large folders take their time."""
    from edgepeft.paths import measure_size, places

    for name, path in places().items():
        found = measure_size(path)
        if found is None:
            yield Place(name, str(path), "not there")
        elif found.unreadable:
            size = f"{format_bytes(found.size_bytes)}, {found.unreadable} unreadable"
            yield Place(name, str(path), size, trouble=True)
        else:
            yield Place(name, str(path), format_bytes(found.size_bytes))


def read_here() -> tuple[tuple[str, str], ...]:
    """What runs where. Packages are asked for their versions, and none is imported."""
    import edgepeft

    terminal = " · ".join(
        word for word in (os.environ.get("TERM", "n/a"), os.environ.get("COLORTERM", ""), _encoding()) if word
    )
    return (
        ("edgepeft", f"{edgepeft.__version__}, in {os.path.dirname(edgepeft.__file__)}"),  # noqa: PTH120
        ("Python", f"{platform.python_version()}, {sys.executable}"),
        *((name, _version(name)) for name in _PACKAGES),
        ("system", platform.platform()),
        ("terminal", terminal),
        ("process", str(os.getpid())),
    )


def words_for(key: str) -> tuple[tuple[str, str], ...]:
    """What a setting of few words may be, each with what it means; empty where it is typed."""
    from edgepeft.settings import WORDS

    if key in WORDS:
        return tuple((word, "") for word in WORDS[key])
    if key == "intent":
        from edgepeft.profiles import load_presets

        return tuple((preset.id, preset.description) for preset in load_presets().values())
    return ()


def check_value(key: str, value: str) -> None:
    """Refuses what a setting cannot be.

    Raises:
        EdgepeftError: saying why.
    """
    from edgepeft.settings import check_setting

    check_setting(key, value)
    if key == "gpu":
        from edgepeft.plan.device import find_device

        find_device(value)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _encoding() -> str:
    return getattr(sys.__stdout__, "encoding", "") or ""
