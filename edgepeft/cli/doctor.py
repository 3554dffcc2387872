"""`edgepeft doctor`: what this machine holds, and what stands in the way of training on it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from edgepeft.cli.output import JsonFlag, line, note, print_json
from edgepeft.cli.output import console as out

if TYPE_CHECKING:
    from edgepeft.hardware.measured import Measured
    from edgepeft.hardware.packages import Packages
    from edgepeft.hardware.problems import Problem
    from edgepeft.hardware.snapshot import Accelerator, GpuSnapshot, HostSnapshot
    from edgepeft.profiles import GpuProfile

_LABEL = 15
_BAR = 24
_ACCENT = "cyan"
_MARKS = {"error": ("✗", "red"), "warning": ("!", "yellow"), "note": ("·", "dim")}


def doctor(
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Show a card that is not here; see `profiles list gpus`.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure throughputs now; takes a few seconds.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show this machine, and every problem with its remedy."""
    from edgepeft.errors import UsageError
    from edgepeft.hardware.accelerators import read_accelerators
    from edgepeft.hardware.assumed import assume_gpu
    from edgepeft.hardware.host import read_host
    from edgepeft.hardware.measured import load_measured
    from edgepeft.hardware.nvml import probe_gpus
    from edgepeft.hardware.packages import read_packages
    from edgepeft.hardware.problems import find_problems
    from edgepeft.profiles import find_gpu, match_gpu

    assumed = find_gpu(gpu) if gpu else None
    if assumed is not None and measure:
        raise UsageError("a card that is not here cannot be measured", where="--measure", hint="Leave out --gpu")
    host, packages = read_host(), read_packages()
    gpus, reason = ([assume_gpu(assumed)], "") if assumed else probe_gpus()
    others = [] if assumed else read_accelerators()
    if measure:
        _measure_all(gpus, packages)
    measured = (
        [] if assumed else [load_measured(device, packages.torch) for device in ("cpu", *(card.uuid for card in gpus))]
    )
    measured_here = [entry for entry in measured if entry is not None]
    profiles = [assumed] if assumed else [match_gpu(card) for card in gpus]
    problems = find_problems(host, gpus, packages, no_gpu_reason=reason)
    if as_json:
        print_json(
            {
                "host": host,
                "gpus": gpus,
                "profiles": profiles,
                "assumed": assumed is not None,
                "no_gpu_reason": reason or None,
                "accelerators": others,
                "packages": packages,
                "measured": measured_here,
                "problems": problems,
            }
        )
        return
    _show_host(host)
    for card, profile in zip(gpus, profiles, strict=True):
        _show_card(card, profile, assumed=assumed is not None)
    if not gpus:
        _show_no_card(reason, others)
    else:
        _show_accelerators(others)
    _show_packages(packages)
    _show_measured(measured_here)
    _show_problems(problems)


def _measure_all(gpus: Sequence[GpuSnapshot], packages: Packages) -> None:
    from edgepeft.errors import DeviceUnusable
    from edgepeft.hardware.measured import measure

    # A torch without CUDA is told among the problems; there is nothing to measure with it.
    cards = gpus if packages.torch_cuda else ()
    for device, name in (("cpu", "CPU"), *((card.uuid, card.name) for card in cards)):
        try:
            measure(device, partial(_note_phase, name))
        except DeviceUnusable as error:
            # The rest of the picture is wanted all the more when a device does not work.
            note(f"{name}: {error}", "yellow")


def _note_phase(name: str, phase: str) -> None:
    note(f"Measuring {name}: {phase} …")


def _show_host(host: HostSnapshot) -> None:
    from edgepeft.units import GIB, format_bytes, format_gib

    _heading("Machine", host.system)
    _row("CPU", host.cpu)
    flags = host.flags
    named = (
        ("AVX2", flags.avx2),
        ("AVX-512", flags.avx512),
        ("AVX-512 BF16", flags.avx512_bf16),
        ("AMX BF16", flags.amx_bf16),
    )
    known = [name for name, has in named if has]
    sets = " · ".join(known) if known else "none" if any(has is False for _, has in named) else "n/a"
    cores = host.physical_cores or host.logical_cores
    threads = f", {host.logical_cores} threads" if host.logical_cores != cores else ""
    _row("", f"{cores} {'core' if cores == 1 else 'cores'}{threads} · {sets}", style="dim")
    used = host.ram_usable_bytes - host.ram_available_bytes
    _row(
        "RAM",
        _bar(used, host.ram_usable_bytes),
        f"{used / GIB:.1f} of {format_gib(host.ram_usable_bytes, digits=1)} used",
    )
    if host.swap_total_bytes:
        _row(
            "Swap",
            f"{host.swap_used_bytes / GIB:.1f} of {format_gib(host.swap_total_bytes, digits=1)} used",
        )
    else:
        _row("Swap", "none")
    _row("Disk", f"{format_bytes(host.disk_free_bytes)} free", f"at {host.disk_path}")


def _show_card(card: GpuSnapshot, profile: GpuProfile | None, *, assumed: bool) -> None:
    from edgepeft.units import GIB, format_gib

    line()
    _heading(card.name, "not in this machine" if assumed else f"card {card.index}")
    if card.total_bytes is None or card.used_bytes is None:
        _row("VRAM", "n/a")
    else:
        free = card.total_bytes - card.used_bytes if card.free_bytes is None else card.free_bytes
        kept = "for a desktop" if assumed else "used"
        _row(
            "VRAM",
            _bar(card.used_bytes, card.total_bytes),
            f"{card.used_bytes / GIB:.1f} of {format_gib(card.total_bytes, digits=1)} {kept}",
        )
        _row("", f"{format_gib(free, digits=1)} free for a run", style="dim")
    for process in card.processes[:4]:
        size = "n/a" if process.used_bytes is None else format_gib(process.used_bytes, digits=1)
        _row("", f"{size:>9}  {process.name} ({process.pid})", style="dim")
    if len(card.processes) > 4:
        _row("", f"           and {len(card.processes) - 4} more", style="dim")
    capability = "n/a" if card.capability is None else f"{card.capability[0]}.{card.capability[1]}"
    architecture = f" ({profile.architecture})" if profile else ""
    bf16 = {True: "bf16", False: "no bf16: computes in fp16", None: "bf16 n/a"}[card.bf16]
    _row("Compute", f"{capability}{architecture} · {bf16}")
    link = card.pcie
    if assumed:
        power = "n/a" if card.power_limit_w is None else f"{card.power_limit_w:.0f} W"
        _row("Board", f"{power} · PCIe {_link(link.max_generation, link.max_lanes)}")
    else:
        cuda = "n/a" if card.cuda_driver is None else f"{card.cuda_driver[0]}.{card.cuda_driver[1]}"
        _row("Driver", f"{_told(card.driver)} · speaks CUDA up to {cuda}")
        limit = "" if card.power_limit_w is None else f" of {card.power_limit_w:.0f}"
        power = "n/a" if card.power_w is None else f"{card.power_w:.0f}{limit} W"
        busy = "n/a" if card.busy_fraction is None else f"{100 * card.busy_fraction:.0f} % busy"
        _row("State", f"{_told(card.temperature_c)} °C · {power} · {busy}")
        _row(
            "PCIe",
            f"{_link(link.generation, link.lanes)} now · {_link(link.max_generation, link.max_lanes)} at most",
        )
        _row("Desktop", {True: "on this card", False: "not on this card", None: "n/a"}[card.display_active])
        _row("UUID", card.uuid, style="dim")
    if profile is not None:
        _show_profile(profile)


def _show_profile(profile: GpuProfile) -> None:
    bandwidth = "n/a" if profile.memory_gb_per_s is None else f"{profile.memory_gb_per_s:.0f} GB/s memory"
    tensor = "n/a" if profile.tensor_tflops is None else f"{profile.tensor_tflops:.0f} TFLOPS 16-bit"
    _row("On paper", f"{bandwidth} · {tensor}", f"profile {profile.id}")


def _show_no_card(reason: str, others: Sequence[Accelerator]) -> None:
    line()
    _heading("Cards")
    _row("NVIDIA", f"none: {reason}" if reason else "none")
    _accelerator_rows(others)
    _row("", "Runs train and chat on the CPU, against a RAM budget.", style="dim")


def _show_accelerators(others: Sequence[Accelerator]) -> None:
    if others:
        line()
        _heading("Other accelerators")
        _accelerator_rows(others)


def _accelerator_rows(others: Sequence[Accelerator]) -> None:
    from edgepeft.units import format_gib

    for other in others:
        memory = "" if other.memory_bytes is None else f" · {format_gib(other.memory_bytes, digits=1)}"
        _row(other.vendor, f"{other.name}{memory}", other.note)


def _show_packages(packages: Packages) -> None:
    line()
    _heading("Software", f"Python {packages.python}")
    if packages.torch is None:
        built = ""
    elif packages.torch_cuda:
        built = f"CUDA {packages.torch_cuda}"
    elif packages.torch_hip:
        built = f"ROCm (HIP {packages.torch_hip})"
    else:
        built = "for the CPU"
    _row("torch", packages.torch or "not installed", built)
    _row("transformers", packages.transformers or "not installed")
    versions = packages.bitsandbytes_cuda
    span = f"for CUDA {_dotted(versions[0])} to {_dotted(versions[-1])}" if versions else "no CUDA library"
    _row("bitsandbytes", packages.bitsandbytes or "not installed", span if packages.bitsandbytes else "")


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _show_measured(measured: Sequence[Measured]) -> None:
    if not measured:
        return
    line()
    _heading("Measured here", measured[0].measured_at[:16].replace("T", " ") + " UTC")
    for entry in measured:
        copies = f"{entry.memory_bytes_per_s / 1e9:.1f} GB/s in memory"
        _row(entry.device_name, f"{entry.matmul_flops / 1e12:.2f} TFLOPS {entry.matmul_dtype} · {copies}")
        if entry.host_to_device_bytes_per_s is not None:
            _row("", f"{entry.host_to_device_bytes_per_s / 1e9:.1f} GB/s from RAM to the card")
    disk = measured[0]
    rates = [
        f"{rate / 1e6:.0f} MB/s {verb}"
        for verb, rate in (("written", disk.disk_write_bytes_per_s), ("read", disk.disk_read_bytes_per_s))
        if rate is not None
    ]
    _row("Disk", " · ".join(rates) or "n/a")


def _show_problems(problems: Sequence[Problem]) -> None:
    serious = [problem for problem in problems if problem.level != "note"]
    notes = [problem for problem in problems if problem.level == "note"]
    line()
    if serious:
        _heading("Problems")
        _show_list(serious)
    else:
        line("No problems found.", "green")
    if notes:
        line()
        _heading("Good to know")
        _show_list(notes)


def _show_list(problems: Sequence[Problem]) -> None:
    width = min(out.width, 100)
    for problem in problems:
        mark, colour = _MARKS[problem.level]
        what = textwrap.wrap(f"{problem.what}.", width - 4)
        out.print(Text.assemble((f"  {mark} ", colour), "\n    ".join(what)))
        for lead, way in (("→ ", problem.remedy), ("or ", problem.alternative)):
            # A command stays in one piece, so that it can be copied.
            wrapped = [way] if _is_command(way) else textwrap.wrap(way, width - 4 - len(lead))
            if way:
                out.print(Text.assemble(f"    {lead}", (("\n" + " " * (4 + len(lead))).join(wrapped), _ACCENT)))


def _is_command(way: str) -> bool:
    return way.startswith(("uv ", "pip "))


def _heading(title: str, aside: str = "") -> None:
    out.print(Text.assemble((title, "bold"), (f"  {aside}" if aside else "", "dim")))


def _row(label: str, value: str | Text, aside: str = "", style: str = "") -> None:
    """A label, its value, and beside that (below it, in a narrow terminal) what is less important."""
    body = value if isinstance(value, Text) else Text(value, style=style)
    shown = Text.assemble((f"  {label:<{_LABEL}}", "dim"), body)
    if aside:
        room = shown.cell_len + 2 + len(aside) <= out.width
        shown.append("  " if room else "\n" + " " * (_LABEL + 2))
        shown.append(aside, "" if isinstance(value, Text) else "dim")
    out.print(shown)


def _bar(used: int, total: int) -> Text:
    filled = 0 if total <= 0 else min(_BAR, max(1 if used > 0 else 0, round(_BAR * used / total)))
    return Text.assemble(("█" * filled, _ACCENT), ("░" * (_BAR - filled), "dim"))


def _link(generation: int | None, lanes: int | None) -> str:
    return f"{'n/a' if generation is None else f'{generation}.0'} ×{_told(lanes)}"


def _told(value: object) -> str:
    return "n/a" if value is None else str(value)
