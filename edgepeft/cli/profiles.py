"""`edgepeft profiles`: the cards and presets that are described in files."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from edgepeft.cli.output import JsonFlag, line, print_json, row, table
from edgepeft.cli.output import console as out

app = typer.Typer(no_args_is_help=True, help="List cards and presets.")


class Kind(StrEnum):
    """Which folder of profiles."""

    gpus = "gpus"
    presets = "presets"


_UNITS = {
    "memory_mib": ("memory", "MiB"),
    "memory_gb_per_s": ("memory bandwidth", "GB/s"),
    "tensor_tflops": ("tensor throughput", "TFLOPS"),
    "board_power_w": ("board power", "W"),
    "desktop_reserve_mib": ("desktop reserve", "MiB"),
}
"""Field → how it is shown."""


@app.command("list")
def list_(
    kind: Annotated[Kind | None, typer.Argument(help="gpus or presets; both when left out.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List the profiles that exist, your own included."""
    from edgepeft.profiles import load_gpus, load_presets

    gpus = load_gpus() if kind is not Kind.presets else {}
    presets = load_presets() if kind is not Kind.gpus else {}
    if as_json:
        shown = {"gpus": list(gpus.values()), "presets": list(presets.values())}
        print_json(shown if kind is None else shown[kind.value])
        return
    if gpus:
        grid = table(
            "gpu",
            "VRAM GiB",
            "compute",
            "bf16",
            "GB/s",
            "TFLOPS",
            "W",
            right=("VRAM GiB", "compute", "GB/s", "TFLOPS", "W"),
        )
        for profile in gpus.values():
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
    if gpus and presets:
        line()
    if presets:
        grid = table("preset", "for")
        for preset in presets.values():
            row(grid, preset.id, preset.description)
        out.print(grid)


@app.command("show")
def show(
    kind: Annotated[Kind, typer.Argument(help="gpus or presets.")],
    profile_id: Annotated[str, typer.Argument(metavar="ID", help="Id, as `profiles list` shows it.")],
    as_json: JsonFlag = False,
) -> None:
    """Show one profile: each value, and where it comes from."""
    import msgspec

    from edgepeft.profiles import find_gpu, find_preset

    profile = find_gpu(profile_id) if kind is Kind.gpus else find_preset(profile_id)
    if as_json:
        print_json(profile)
        return
    values: dict[str, Any] = msgspec.to_builtins(profile)
    origins: dict[str, str] = values.pop("sources", {})
    line(values.pop("id"), "bold")
    for name, value in values.items():
        reason = origins.get(name, "")
        if isinstance(value, dict):
            value, reason = value["value"], value["description"]
        _entry(name, value, reason)


def _entry(name: str, value: Any, reason: str) -> None:
    import textwrap

    label, unit = _UNITS.get(name, (name.replace("_", " "), ""))
    if value is None:
        shown = "n/a"
    elif isinstance(value, bool):
        shown = "yes" if value else "no"
    elif isinstance(value, list | tuple):
        shown = ", ".join(map(str, value))
    else:
        shown = f"{value:g} {unit}" if unit else str(value)
    line(f"  {label:<22}{shown}")
    for part in textwrap.wrap(reason, min(out.width, 100) - 24, break_long_words=False, break_on_hyphens=False):
        line(" " * 24 + part, "dim")


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.0f}"
