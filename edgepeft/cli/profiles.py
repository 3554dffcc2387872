"""`edgepeft profiles`: the cards, presets and models that are described in files."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgepeft.cli.output import JsonFlag, line, print_json, row, table
from edgepeft.cli.output import console as out

if TYPE_CHECKING:
    from edgepeft.models.described import ModelProfile, TokenizerProfile
    from edgepeft.profiles import GpuProfile, Preset, Profile

app = typer.Typer(no_args_is_help=True, help="List cards, presets and models that files describe.")


class Kind(StrEnum):
    """Which folder of profiles."""

    gpus = "gpus"
    presets = "presets"
    models = "models"
    tokenizers = "tokenizers"


_KINDS = "gpus, presets, models or tokenizers"
_UNITS = {
    "memory_mib": ("memory", "MiB"),
    "memory_gb_per_s": ("memory bandwidth", "GB/s"),
    "tensor_tflops": ("tensor throughput", "TFLOPS"),
    "board_power_w": ("board power", "W"),
    "desktop_reserve_mib": ("desktop reserve", "MiB"),
    "sample_tokens": ("beside its turns", "tokens"),
    "tokens": ("tokens for each", ""),
}
"""Field → how it is shown."""
_LABEL_COLUMNS = 24


@app.command("list")
def list_(
    kind: Annotated[Kind | None, typer.Argument(help=f"{_KINDS}; cards, presets and models when left out.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List the profiles that exist, your own included."""
    usual = (Kind.gpus, Kind.presets, Kind.models)
    shown = {each.value: _load(each) for each in (usual if kind is None else (kind,))}
    if as_json:
        lists = {name: list(profiles.values()) for name, profiles in shown.items()}
        print_json(lists if kind is None else lists[kind.value])
        return
    tables: dict[str, Callable[[Any], None]] = {
        "gpus": _list_gpus,
        "presets": _list_presets,
        "models": _list_models,
        "tokenizers": _list_tokenizers,
    }
    for number, (name, profiles) in enumerate(shown.items()):
        if number:
            line()
        tables[name](profiles)


@app.command("show")
def show(
    kind: Annotated[str, typer.Argument(metavar="KIND", help=f"{_KINDS}; may be left out.")],
    profile_id: Annotated[
        str, typer.Argument(metavar="ID", help="Id, as `profiles list` shows it; of a model also its name on the hub.")
    ] = "",
    as_json: JsonFlag = False,
) -> None:
    """Show one profile: each value, and where it comes from."""
    import msgspec

    profile = _find(kind, profile_id) if profile_id else _find_anywhere(kind)
    if as_json:
        print_json(profile)
        return
    values: dict[str, Any] = msgspec.to_builtins(profile)
    origins: dict[str, str] = values.pop("sources", {})
    line(values.pop("id"), "bold")
    for name, value in values.items():
        reason = origins.get(name, "")
        if isinstance(value, dict) and set(value) == {"value", "description"}:
            value, reason = value["value"], value["description"]
        if value == "" and not reason:
            continue
        _entry(name, value, reason)
    _show_sizes(profile)


def _load(kind: Kind) -> Mapping[str, Profile]:
    from edgepeft.models.described import load_models, load_tokenizers
    from edgepeft.profiles import load_gpus, load_presets

    loaders: dict[Kind, Callable[[], Mapping[str, Profile]]] = {
        Kind.gpus: load_gpus,
        Kind.presets: load_presets,
        Kind.models: load_models,
        Kind.tokenizers: load_tokenizers,
    }
    return loaders[kind]()


def _find(kind: str, profile_id: str) -> Profile:
    from edgepeft.errors import UsageError
    from edgepeft.models.described import find_model_profile, find_tokenizer_profile
    from edgepeft.profiles import find_gpu, find_preset

    finders: dict[str, Callable[[str], Profile]] = {
        "gpus": find_gpu,
        "presets": find_preset,
        "models": find_model_profile,
        "tokenizers": find_tokenizer_profile,
    }
    if kind not in finders:
        raise UsageError(f"unknown kind {kind!r}", where="profiles show", hint=f"Known: {', '.join(finders)}")
    return finders[kind](profile_id)


def _find_anywhere(profile_id: str) -> Profile:
    """The profile of that id, whichever folder it is in.

    Raises:
        UsageError: no folder has it; the nearest ids of all are named.
    """
    from edgepeft.errors import UsageError
    from edgepeft.models.described import described_model
    from edgepeft.profiles import known_id

    if profile_id in set(Kind):
        raise UsageError(
            "ID is missing", where=f"profiles show {profile_id}", hint=f"See edgepeft profiles list {profile_id}"
        )
    model = described_model(profile_id)
    if model is not None:
        return model
    # A model may be called like its tokenizer: the tokenizer is then shown with its kind.
    every = {**_load(Kind.tokenizers), **_load(Kind.presets), **_load(Kind.gpus), **_load(Kind.models)}
    return every[known_id(profile_id, every, what="profile", where="profiles show", listing="edgepeft profiles list")]


def _list_gpus(profiles: Mapping[str, GpuProfile]) -> None:
    numbers = ("VRAM GiB", "compute", "GB/s", "TFLOPS", "W")
    grid = table("gpu", "VRAM GiB", "compute", "bf16", "GB/s", "TFLOPS", "W", right=numbers)
    for profile in profiles.values():
        row(
            grid,
            profile.id,
            f"{profile.memory_mib / 1024:.1f}",
            profile.compute_capability,
            "yes" if profile.bf16 else "no",
            _number(profile.memory_gb_per_s),
            _number(profile.tensor_tflops),
            _number(profile.board_power_w),
        )
    out.print(grid)
    line("TFLOPS: dense 16-bit products with float32 accumulation. n/a: no trustworthy figure.", "dim")


def _list_presets(profiles: Mapping[str, Preset]) -> None:
    grid = table("preset", "for")
    for preset in profiles.values():
        row(grid, preset.id, preset.description)
    out.print(grid)


def _list_models(profiles: Mapping[str, ModelProfile]) -> None:
    from edgepeft.models.sizes import size_by_precision
    from edgepeft.units import GIB, format_count

    numbers = ("parameters", "context", "bf16 GiB", "nf4 GiB")
    grid = table("model", "parameters", "context", "bf16 GiB", "nf4 GiB", "licence", right=numbers)
    for profile in profiles.values():
        sizes = size_by_precision(profile.shape)
        row(
            grid,
            profile.id,
            format_count(profile.parameters),
            f"{profile.shape.context_length:,}",
            f"{sizes['bf16'] / GIB:.1f}",
            f"{sizes['nf4'] / GIB:.1f}",
            profile.licence,
        )
    out.print(grid)
    line(
        "GiB: the weights alone. Plan for one without a download: edgepeft plan MODEL. Which fit: edgepeft fits.", "dim"
    )


def _list_tokenizers(profiles: Mapping[str, TokenizerProfile]) -> None:
    grid = table("tokenizer", "chars/token", "of", right=("chars/token",))
    for profile in profiles.values():
        row(grid, profile.id, f"{profile.chars_per_token:.2f}", profile.name)
    out.print(grid)
    line("chars/token: in English instructions and answers. Used for lengths while a model is not on this disk.", "dim")


def _show_sizes(profile: Profile) -> None:
    from edgepeft.models.described import ModelProfile
    from edgepeft.models.sizes import size_by_precision
    from edgepeft.units import format_bytes

    if isinstance(profile, ModelProfile):
        sizes = (f"{name} {format_bytes(size)}" for name, size in size_by_precision(profile.shape).items())
        _entry("weights", ", ".join(sizes), "embeddings, head and norms are 16-bit in all of them")


def _entry(name: str, value: Any, reason: str) -> None:
    label, unit = _UNITS.get(name, (name.replace("_", " "), ""))
    width = max(20, min(out.width, 100) - _LABEL_COLUMNS)
    if isinstance(value, dict):
        shown = [f"{key} = {_said(item)}" for key, item in value.items()]
    elif isinstance(value, list | tuple) and len(", ".join(map(str, value))) > width:
        shown = [str(item) for item in value]
    else:
        shown = [f"{_said(value)} {unit}" if unit and value is not None else _said(value)]
    for number, text in enumerate(shown):
        line(f"  {label if not number else '':<{_LABEL_COLUMNS - 2}}{text}")
    for part in textwrap.wrap(reason, width, break_long_words=False, break_on_hyphens=False):
        line(" " * _LABEL_COLUMNS + part, "dim")


def _said(value: Any) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1e5 else f"{value:g}"
    return ", ".join(map(_said, value)) if isinstance(value, list | tuple) else str(value)


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.0f}"
