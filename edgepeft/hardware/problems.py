"""What is wrong with this machine for training, and what to do about it. Pure functions over recorded facts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from edgepeft.hardware.packages import Packages
from edgepeft.hardware.snapshot import GpuProcess, GpuSnapshot, HostSnapshot
from edgepeft.units import GIB, MIB, format_bytes, format_gib

Level = Literal["error", "warning", "note"]
"""error: no training on this device; warning: it will be slower or smaller; note: good to know."""

LOWEST_CAPABILITY = (7, 5)
"""What PyTorch's CUDA 13 wheels begin with, and what int8 products of bitsandbytes need."""
_OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}
"""CUDA major version → oldest driver branch of its minor-version compatibility: NVIDIA, CUDA Compatibility, table 1,
https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html"""
_WHEEL_ARCHITECTURES = {
    (12, 6): ((5, 0), (6, 0), (7, 0), (7, 5), (8, 0), (8, 6), (9, 0)),
    (12, 8): ((7, 0), (7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0)),
    (13, 0): ((7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0)),
    (13, 2): ((7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0)),
}
"""CUDA version → architectures in PyTorch's x86 wheels: PyTorch CUDA Support Matrix in RELEASE.md,
https://github.com/pytorch/pytorch/blob/main/RELEASE.md; wheels for other CUDA versions are not judged."""
_WHEELS_WITH_PTX = {(13, 0), (13, 2)}
"""Their Linux builds also hold portable code, which later cards can run (same source)."""
_DESKTOP_BYTES = 512 * MIB
_PROCESS_BYTES = 256 * MIB
_LOW_DISK_BYTES = 20 * GIB
_VERY_LOW_DISK_BYTES = 2 * GIB
_LOW_RAM_BYTES = 8 * GIB
_LOW_AVAILABLE_BYTES = 2 * GIB
_INSTALL_TORCH = "uv pip install --torch-backend=auto torch"


class Problem(msgspec.Struct, frozen=True):
    """Something that stands in the way."""

    id: str
    """Stable name, such as `torch-cpu-only`."""
    level: Level
    what: str
    """One sentence, without a full stop."""
    remedy: str
    """What to do; a command where there is one."""
    alternative: str = ""
    """Another way to the same end, such as the form for pip."""


def find_problems(
    host: HostSnapshot,
    gpus: Sequence[GpuSnapshot],
    packages: Packages,
    *,
    no_gpu_reason: str = "",
) -> list[Problem]:
    """Everything that stands in the way of training, the worst first.

    Args:
        host: this machine.
        gpus: its NVIDIA cards, or the card that one thinks of buying.
        packages: what is installed.
        no_gpu_reason: why `gpus` is empty, as `nvml.probe_gpus` says it.
    """
    found = _driver_problems(host, gpus, packages, no_gpu_reason)
    found += _torch_problems(host, gpus, packages)
    for gpu in gpus:
        found += _card_problems(host, gpu, packages)
        found += _occupation_problems(gpu, several=len(gpus) > 1)
    found += _bitsandbytes_problems(gpus, packages)
    found += _host_problems(host, gpus)
    order: dict[Level, int] = {"error": 0, "warning": 1, "note": 2}
    return sorted(found, key=lambda problem: order[problem.level])


def wheel_runs_on(
    cuda: tuple[int, int], capability: tuple[int, int], *, machine: str = "x86_64", system: str = "Linux"
) -> bool | None:
    """Whether PyTorch's wheel for that CUDA holds code for the card; None where its contents are not known.

    Machine code runs on cards of the same major and an equal or higher minor capability.
    """
    if machine.lower() not in ("x86_64", "amd64"):
        return None
    architectures = _WHEEL_ARCHITECTURES.get(cuda)
    if architectures is None:
        return None
    if any(major == capability[0] and minor <= capability[1] for major, minor in architectures):
        return True
    return cuda in _WHEELS_WITH_PTX and system.startswith("Linux") and capability > max(architectures)


def parse_cuda(text: str | None) -> tuple[int, int] | None:
    """`13.0` as (13, 0); None when it is not a version."""
    parts = (text or "").split(".")
    if len(parts) >= 2 and parts[0].isdigit() and parts[1].isdigit():
        return int(parts[0]), int(parts[1])
    return None


def _driver_problems(host: HostSnapshot, gpus: Sequence[GpuSnapshot], packages: Packages, reason: str) -> list[Problem]:
    found = []
    if not gpus and (host.nvidia_device or (reason and reason != "no NVIDIA driver is installed")):
        if "updated" in reason:
            remedy = "Restart the machine"
        elif "WSL" in host.system:
            remedy = "Install NVIDIA's driver on Windows, not inside WSL; then run: wsl --shutdown"
        else:
            remedy = "Install NVIDIA's driver with your system's package manager, and restart"
        found.append(
            Problem("no-driver", "error", f"There is an NVIDIA card, but {reason or 'no driver answers'}", remedy)
        )
    cuda = parse_cuda(packages.torch_cuda)
    gpu = gpus[0] if gpus else None
    if gpu is not None and cuda is not None and _driver_too_old(gpu, cuda[0]):
        oldest = _OLDEST_DRIVERS.get(cuda[0])
        needs = f"{oldest} or later" if oldest else "a newer one"
        found.append(
            Problem(
                "driver-too-old",
                "error",
                f"The driver {gpu.driver or '(version unknown)'} is too old for torch's CUDA {cuda[0]}.{cuda[1]}, "
                f"which needs {needs}",
                "Update the NVIDIA driver",
                "uv pip install --torch-backend=auto --reinstall torch",
            )
        )
    return found


def _driver_too_old(gpu: GpuSnapshot, cuda_major: int) -> bool:
    # What the driver says of itself counts most: compatibility packages lift it above its branch.
    if gpu.cuda_driver is not None:
        return gpu.cuda_driver[0] < cuda_major
    branch = (gpu.driver or "").split(".")[0]
    oldest = _OLDEST_DRIVERS.get(cuda_major)
    return branch.isdigit() and oldest is not None and int(branch) < oldest


def _torch_problems(host: HostSnapshot, gpus: Sequence[GpuSnapshot], packages: Packages) -> list[Problem]:
    if packages.torch is None:
        return [Problem("torch-missing", "error", "torch is not installed in this Python", _INSTALL_TORCH)]
    if gpus and packages.torch_cuda is None:
        kind = "for AMD cards" if packages.torch_hip else "for CPUs only"
        return [
            Problem(
                "torch-cpu-only",
                "error",
                f"torch {packages.torch} was built {kind}, so the {gpus[0].name} would stay idle",
                f"{_INSTALL_TORCH} --reinstall",
                _pip_torch(host),
            )
        ]
    return []


def _pip_torch(host: HostSnapshot) -> str:
    # PyPI's wheels hold CUDA on Linux; those for Windows are for the CPU.
    if host.system.startswith("Windows"):
        return "the pip command for Windows and CUDA that pytorch.org/get-started shows"
    return "pip install --force-reinstall --no-cache-dir torch"


def _card_problems(host: HostSnapshot, gpu: GpuSnapshot, packages: Packages) -> list[Problem]:
    if gpu.capability is None:
        return []
    found = []
    capability = f"{gpu.capability[0]}.{gpu.capability[1]}"
    cuda = parse_cuda(packages.torch_cuda)
    if cuda is not None and wheel_runs_on(cuda, gpu.capability, machine=host.machine, system=host.system) is False:
        backend = "cu126" if gpu.capability < LOWEST_CAPABILITY else "cu130"
        found.append(
            Problem(
                "architecture-missing",
                "error",
                f"torch's wheel for CUDA {cuda[0]}.{cuda[1]} holds no code for the {gpu.name} "
                f"(compute capability {capability})",
                f"uv pip install --torch-backend={backend} --reinstall torch",
            )
        )
    if gpu.capability < LOWEST_CAPABILITY:
        found.append(
            Problem(
                "old-architecture",
                "warning",
                f"The {gpu.name} has compute capability {capability}: no int8 products, and no torch for CUDA 13",
                "Plan with NF4 or 16 bit and a torch for CUDA 12.6, or use a card of the RTX 20 series or later",
            )
        )
    elif not gpu.bf16:
        found.append(
            Problem(
                "no-bf16",
                "note",
                f"The {gpu.name} does not multiply bfloat16",
                "Nothing to do: runs compute in fp16 there and scale their gradients",
            )
        )
    return found


def _occupation_problems(gpu: GpuSnapshot, *, several: bool) -> list[Problem]:
    where = f" on card {gpu.index}" if several else ""
    desktop = [process for process in gpu.processes if process.kind == "graphics"]
    others = [
        process
        for process in gpu.processes
        if process.kind != "graphics" and (process.used_bytes or 0) >= _PROCESS_BYTES
    ]
    found = []
    desktop_bytes = sum(process.used_bytes or 0 for process in desktop)
    if not desktop_bytes and gpu.display_active and not others:
        # Windows does not tell who holds what; with a desktop and nobody else, it is the desktop.
        desktop_bytes = gpu.used_bytes or 0
    if desktop_bytes >= _DESKTOP_BYTES:
        named = f" ({_names(desktop)})" if desktop else ""
        found.append(
            Problem(
                "desktop-on-card",
                "warning",
                f"The desktop holds {format_gib(desktop_bytes, digits=1)} of VRAM{where}{named}",
                "Close browsers and games, switch off hardware acceleration in them, "
                "or connect the screen to the mainboard's graphics",
            )
        )
    for process in others:
        ours = process.name.startswith("edgepeft ")
        if process.name == "edgepeft train":
            remedy = "See edgepeft runs list; edgepeft runs stop ends a run and saves it"
        elif ours:
            remedy = "Leave that chat when the memory is needed for a run"
        else:
            remedy = f"End it when it is not needed (process {process.pid})"
        found.append(
            Problem(
                "card-in-use",
                "note" if ours else "warning",
                f"{process.name} holds {format_gib(process.used_bytes or 0, digits=1)} of VRAM{where}",
                remedy,
            )
        )
    return found


def _names(processes: Sequence[GpuProcess]) -> str:
    names = list(dict.fromkeys(process.name for process in processes))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _bitsandbytes_problems(gpus: Sequence[GpuSnapshot], packages: Packages) -> list[Problem]:
    if packages.bitsandbytes is None:
        what = "bitsandbytes is not installed: no 4-bit and 8-bit models"
        return [Problem("bitsandbytes-missing", "error", what, "uv pip install bitsandbytes")]
    cuda = parse_cuda(packages.torch_cuda)
    # bitsandbytes takes another minor version of the same CUDA, never another major one.
    if gpus and cuda is not None and all(major != cuda[0] for major, _ in packages.bitsandbytes_cuda):
        return [
            Problem(
                "bitsandbytes-cuda",
                "error",
                f"bitsandbytes {packages.bitsandbytes} holds no library for torch's CUDA {cuda[0]}.{cuda[1]}",
                "uv pip install --upgrade bitsandbytes",
            )
        ]
    return []


def _host_problems(host: HostSnapshot, gpus: Sequence[GpuSnapshot]) -> list[Problem]:
    found = []
    if host.disk_free_bytes < _LOW_DISK_BYTES:
        found.append(
            Problem(
                "low-disk",
                "error" if host.disk_free_bytes < _VERY_LOW_DISK_BYTES else "warning",
                f"Only {format_bytes(host.disk_free_bytes)} of disk are free at {host.disk_path}; "
                "an 8 B model in 16 bit takes 15 GiB",
                "Free some space, or set EDGEPEFT_HOME to a folder on another disk; edgepeft where shows what is used",
            )
        )
    if host.ram_limit_bytes is not None:
        found.append(
            Problem(
                "container-limit",
                "note",
                f"This container may use {format_gib(host.ram_limit_bytes, digits=1)} of the machine's "
                f"{format_gib(host.ram_total_bytes, digits=1)} of RAM",
                "Plans keep to that; raise the container's limit if they should not",
            )
        )
    if host.ram_usable_bytes < _LOW_RAM_BYTES:
        found.append(
            Problem(
                "low-ram",
                "warning",
                f"{format_gib(host.ram_usable_bytes, digits=1)} of RAM: models pass through it while they load",
                "Stay with small models, or add swap",
            )
        )
    elif host.ram_available_bytes < _LOW_AVAILABLE_BYTES:
        found.append(
            Problem(
                "low-ram-available",
                "warning",
                f"Only {format_gib(host.ram_available_bytes, digits=1)} of RAM are free now",
                "Close other programs before a run",
            )
        )
    if host.flags.avx2 is False and not gpus:
        found.append(
            Problem(
                "no-avx2",
                "warning",
                "This CPU has no AVX2, so that training on it takes many times longer",
                "Use a machine with a card, or a CPU of the last ten years",
            )
        )
    return found
