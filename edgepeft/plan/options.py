"""The options of a plan as texts: what each may be, what the command line makes of them, and the command that says
the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_type_hints

import msgspec

from edgepeft.errors import UsageError
from edgepeft.methods import METHODS
from edgepeft.plan import pins
from edgepeft.plan.option_help import HELP
from edgepeft.spec import TrainOn

Kind = Literal["word", "count", "number", "share", "switch", "text", "list"]
SEPARATOR = "|"
"""Between the entries of a list that is written on one line."""
_FORMATS = ("alpaca", "sharegpt", "messages", "prompt-completion", "text")
_SET = "set"


class Option(msgspec.Struct, frozen=True):
    """One option of `plan` and `train`."""

    name: str
    """As it is typed, without its dashes before."""
    kind: Kind
    words: tuple[str, ...] = ()
    """All that it may be; empty where it is not one of a few words."""
    help: str = ""
    """What it is, in one line."""


def _all_options() -> dict[str, Option]:
    found = [Option(_dashed(name), "word", words) for name, words in pins.WORDS.items()]
    found += [Option(_dashed(name), "count") for name in pins.COUNTS]
    found += [Option(_dashed(name), "number") for name in (*pins.RANGES, "lora_plus_ratio", "weight_decay")]
    found += [Option(_dashed(name), "share") for name in pins.SHARES]
    found += [Option(_dashed(name), "switch", ("yes", "no")) for name in pins.SWITCHES]
    found += [Option(name, "text") for name in ("budget", "gpu", "intent", "from", "targets", "max-time")]
    found += [Option(name, "text") for name in ("eval-data", "system", "template")]
    found += [Option("train-on", "word", get_args(TrainOn)), Option("format", "word", _FORMATS)]
    found += [Option(name, "list") for name in (_SET, "sample-prompt", "map")]
    by_name = {option.name: option for option in found}
    return {name: msgspec.structs.replace(by_name[name], help=text) for name, text in HELP.items()}


def _dashed(name: str) -> str:
    return name.rstrip("_").replace("_", "-")


OPTIONS = _all_options()
"""Every option by its name."""


def method_options(method: str) -> dict[str, Option]:
    """The settings of a method by name; those of LoRA that are options of their own are among them.

    Args:
        method: its id.
    """
    found = {}
    types = get_type_hints(METHODS[method].config_type)
    for field in METHODS[method].config_type.__struct_fields__:
        name, kind = _dashed(field), types[field]
        if name in OPTIONS:
            found[name] = OPTIONS[name]
        elif kind is bool:
            found[name] = Option(name, "switch", ("yes", "no"))
        elif words := tuple(word for word in get_args(kind) if isinstance(word, str)):
            found[name] = Option(name, "word", words)
        else:
            kinds: dict[object, Kind] = {int: "count", float: "number"}
            found[name] = Option(name, kinds.get(kind, "text"))
    return found


def typed_options(values: Mapping[str, str]) -> dict[str, Any]:
    """What `plan` would get for these options, as `build` takes it.

    Args:
        values: option, or setting of a method, by its name → text. Thousands may have commas, shares may be percent.

    Raises:
        UsageError: a number cannot be read.
    """
    typed: dict[str, Any] = {}
    settings = []
    for name, text in values.items():
        option = OPTIONS.get(name)
        if option is None:
            settings.append(f"{name.replace('-', '_')}={_setting(text)}")
        elif option.kind != "switch":
            typed["from_" if name == "from" else name.replace("-", "_")] = _parsed(option, text.strip())
        elif _is_on(text):
            typed[name] = True
    if settings:
        typed[_SET] = [*typed.get(_SET, ()), *settings]
    return typed


def spelt_options(typed: Mapping[str, Any]) -> dict[str, str]:
    """The other way: what `build` takes, as texts by option."""
    values: dict[str, str] = {}
    for name, value in typed.items():
        if name == _SET:
            pairs = (str(text).partition("=") for text in value)
            values |= {_dashed(field.strip()): setting.strip() for field, _, setting in pairs}
        elif isinstance(value, bool):
            values[_dashed(name)] = "yes" if value else "no"
        elif isinstance(value, list | tuple):
            values[_dashed(name)] = f" {SEPARATOR} ".join(map(str, value))
        else:
            values[_dashed(name)] = f"{value:g}" if isinstance(value, float) else str(value)
    return values


def command_line(model: str, data: str | None, values: Mapping[str, str], name: str | None = None) -> list[str]:
    """The command whose plan is that of these options: `train` where the adapter has a name, else `plan`.

    Args:
        model: as it was chosen.
        data: the training file.
        values: as `typed_options` takes them.
        name: of the adapter.

    Raises:
        UsageError: as `typed_options`.
    """
    command = ["edgepeft", "plan" if name is None else "train", model, *([data] if data is not None else [])]
    for field, value in typed_options(values).items():
        option = "--" + _dashed(field)
        if value is True:
            command.append(option)
        elif isinstance(value, list):
            command += [part for entry in value for part in _pair(option, str(entry))]
        else:
            command += _pair(option, f"{value!r}" if isinstance(value, float) else str(value))
    return command + (["--name", name] if name is not None else [])


def _pair(option: str, value: str) -> Sequence[str]:
    # A value that begins with a dash would be taken for an option.
    return [f"{option}={value}"] if value.startswith("-") else [option, value]


def _setting(text: str) -> str:
    return {"yes": "true", "no": "false"}.get(text.strip(), text.strip())


def _is_on(text: str) -> bool:
    return text.strip().lower() in ("yes", "on", "true")


def _parsed(option: Option, text: str) -> Any:
    if option.kind == "count":
        plain = text.replace(",", "").replace(" ", "")
        if not plain.lstrip("-").isdecimal():
            raise UsageError(f"{text!r} is no whole number", where=f"--{option.name}", hint="Write it like 512")
        return int(plain)
    if option.kind in ("number", "share"):
        share = option.kind == "share" and text.endswith("%")
        try:
            number = float(text.rstrip("% "))
        except ValueError:
            raise UsageError(f"{text!r} is no number", where=f"--{option.name}", hint="Write it like 0.1") from None
        return number / 100 if share else number
    if option.kind == "list":
        return [entry.strip() for entry in text.split(SEPARATOR) if entry.strip()]
    return text
