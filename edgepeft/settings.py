"""The user's settings in config.toml. A value comes from default < preset < config.toml < environment < option."""

from __future__ import annotations

import os
import tomllib
from typing import Any, Literal

import msgspec

from edgepeft.errors import BadInput, UsageError
from edgepeft.paths import home, write_atomic
from edgepeft.units import parse_bytes


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Every key of config.toml, with its default."""

    budget: str | None = None
    """Memory a run may use, such as 20GiB; None uses what is free, less a margin."""
    gpu: str | None = None
    """Card to plan and train on: a profile id, or a UUID as `doctor` shows it; `cpu` for none."""
    intent: str | None = None
    """Preset: quality, balanced, speed or prototype."""
    theme: str | None = None
    """Theme of the terminal UI."""
    glyphs: str | None = None
    """Signs of the terminal UI: unicode or ascii; None asks the terminal."""
    spacing: str | None = None
    """Spacing of the terminal UI: roomy or compact."""
    keys: dict[str, str] = {}
    """Keys of the terminal UI: an action's id, such as train.stop, and its keys with commas between."""
    co2_grams_per_kwh: float | str | None = None
    """Grams of CO₂ of one kWh where you are, for the estimate beside a run's energy; None is the world's average."""


WORLD_CO2_GRAMS_PER_KWH = 445.0
"""Mean of the world's electricity in 2024: International Energy Agency, *Electricity 2025*, chapter Emissions."""
_LARGEST_CO2_GRAMS = 5000.0
"""Above any grid; lignite alone gives some 1,200."""
WORDS: dict[str, tuple[str, ...]] = {"glyphs": ("unicode", "ascii"), "spacing": ("roomy", "compact")}
"""What the settings of a few words may be."""
_KEYS = "keys."
"""What comes before an action's id where one key of the UI is set."""
_ENVIRONMENT = {name: f"EDGEPEFT_{name.upper()}" for name in Settings.__struct_fields__ if name != "keys"}


def stored_settings() -> Settings:
    """What config.toml says.

    Raises:
        BadInput: it is not TOML, has an unknown key or a value of the wrong type.
    """
    path = home().config_file
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Settings()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot be read: {error}", where=str(path)) from error
    try:
        return msgspec.convert(tomllib.loads(text), Settings)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise BadInput(
            f"not valid settings: {error}", where=str(path), hint="Known keys: " + ", ".join(Settings.__struct_fields__)
        ) from error


def settings() -> Settings:
    """The settings in force: config.toml, overridden by EDGEPEFT_BUDGET, EDGEPEFT_GPU and so on."""
    found = {name: os.environ[variable] for name, variable in _ENVIRONMENT.items() if os.environ.get(variable)}
    return msgspec.structs.replace(stored_settings(), **found)


class ShownSetting(msgspec.Struct, frozen=True):
    """One setting, as it is in force."""

    key: str
    """As `store_setting` takes it."""
    value: str | None
    """None where nothing was said."""
    origin: Literal["default", "config.toml", "environment"]


def shown_settings() -> list[ShownSetting]:
    """Every setting in force with where it comes from; last the keys of the UI that were changed."""
    stored = msgspec.structs.asdict(stored_settings())
    found: list[ShownSetting] = []
    for name, variable in _ENVIRONMENT.items():
        if said := os.environ.get(variable):
            found.append(ShownSetting(name, said, "environment"))
        elif stored[name] is not None:
            found.append(ShownSetting(name, str(stored[name]), "config.toml"))
        else:
            found.append(ShownSetting(name, None, "default"))
    return found + [ShownSetting(_KEYS + action, keys, "config.toml") for action, keys in stored["keys"].items()]


def variable_of(key: str) -> str:
    """The environment variable that comes before a setting of config.toml."""
    return _ENVIRONMENT[key]


def check_setting(key: str, value: str) -> None:
    """Refuses a value that nothing could use. Presets, cards and themes are checked where they are known.

    Raises:
        UsageError: it cannot be meant.
    """
    if key == "budget":
        parse_bytes(value, where=key)
    elif key == "co2_grams_per_kwh":
        _grams(value)
    elif key in WORDS and value not in WORDS[key]:
        raise UsageError(f"unknown {value!r}", where=key, hint=f"Known: {', '.join(WORDS[key])}")


def carbon_factor() -> float:
    """Grams of CO₂ of one kWh: the setting, else the world's average.

    Raises:
        UsageError: the setting is not a number of grams.
    """
    value = settings().co2_grams_per_kwh
    if value is None:
        return WORLD_CO2_GRAMS_PER_KWH
    return _grams(value)


def _grams(value: float | str) -> float:
    try:
        grams = float(value)
    except ValueError:
        grams = -1.0
    if not 0 <= grams <= _LARGEST_CO2_GRAMS:
        raise UsageError(
            f"{value!r} is no number of grams of CO₂",
            where="co2_grams_per_kwh",
            hint="Give what one kWh causes, such as 350",
        )
    return grams


def store_setting(key: str, value: str | None) -> None:
    """Writes one key to config.toml; None removes it. `keys.ID` is a key of the terminal UI.

    Raises:
        UsageError: the key is not known.
    """
    import tomli_w

    action = key.removeprefix(_KEYS) if key.startswith(_KEYS) else ""
    if not action and key not in _ENVIRONMENT:
        known = ", ".join([*_ENVIRONMENT, f"{_KEYS}ACTION"])
        raise UsageError(f"unknown setting {key!r}", where="config", hint=f"Known: {known}")
    stored = stored_settings()
    if action:
        others = {name: keys for name, keys in stored.keys.items() if name != action}
        stored = msgspec.structs.replace(stored, keys=others if value is None else others | {action: value})
    else:
        stored = msgspec.structs.replace(stored, **{key: value})
    changed: dict[str, Any] = msgspec.to_builtins(stored)
    write_atomic(home().config_file, tomli_w.dumps({name: kept for name, kept in changed.items() if kept is not None}))
