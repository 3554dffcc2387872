"""The machine around the cards: CPU, memory, disk. Reads files and psutil, starts no process but sysctl on a Mac."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from edgepeft.hardware.snapshot import CpuFlags, HostSnapshot
from edgepeft.paths import home

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_NVIDIA_VENDOR = "0x10de"


def read_host() -> HostSnapshot:
    """This machine now."""
    import psutil

    memory = psutil.virtual_memory()
    swap = psutil.swap_memory()
    limit, used = read_cgroup_memory(_CGROUP_ROOT, Path("/proc/self/cgroup"))
    if limit is not None and limit >= memory.total:
        limit = None
    available = int(memory.available)
    if limit is not None and used is not None:
        available = max(0, min(available, limit - used))
    folder = existing_parent(home().models)
    return HostSnapshot(
        system=_system(),
        machine=platform.machine(),
        cpu=_cpu_name(),
        physical_cores=psutil.cpu_count(logical=False),
        logical_cores=psutil.cpu_count() or os.cpu_count() or 1,
        flags=_cpu_flags(),
        ram_total_bytes=int(memory.total),
        ram_available_bytes=available,
        ram_limit_bytes=limit,
        swap_total_bytes=int(swap.total),
        swap_used_bytes=int(swap.used),
        disk_path=str(folder),
        disk_free_bytes=int(psutil.disk_usage(str(folder)).free),
        nvidia_device=has_nvidia_device(Path("/sys/bus/pci/devices")),
    )


def existing_parent(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    return next((folder for folder in (path, *path.parents) if folder.is_dir()), Path(path.anchor or "."))


def read_cgroup_memory(root: Path, membership: Path) -> tuple[int | None, int | None]:
    """Memory limit and use of this process's control group in bytes; None where there is no limit or no such file.

    Version 2 keeps `memory.max` and `memory.current` in the group's folder, version 1 has the `memory` controller's
    `memory.limit_in_bytes`; a group's limit is the lowest on the way up to the root.
    """
    found: tuple[int | None, int | None] = (None, None)
    for folder, limit_name, usage_name in _cgroup_folders(root, membership):
        limit, usage = _number(folder / limit_name), _number(folder / usage_name)
        if limit is not None and (found[0] is None or limit < found[0]):
            found = (limit, usage)
    return found


def _cgroup_folders(root: Path, membership: Path) -> list[tuple[Path, str, str]]:
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            base, names = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = base / path.lstrip("/")
        # Inside a container the path may be the host's: then only the root itself exists.
        chain = [group, *group.parents]
        folders += [(folder, *names) for folder in chain if folder.is_relative_to(base)]
    return folders


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def has_nvidia_device(devices: Path) -> bool:
    """Whether the PCI bus shows an NVIDIA display or 3D controller; False where the system has no such list."""
    for device in sorted(devices.iterdir()) if devices.is_dir() else ():
        if _line(device / "vendor") == _NVIDIA_VENDOR and (_line(device / "class") or "").startswith("0x03"):
            return True
    return False


def _line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def flags_from_cpuinfo(text: str) -> CpuFlags:
    """Instruction sets from the text of /proc/cpuinfo; all None when it lists no x86 flags."""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            flags = set(value.split())
            return CpuFlags(
                avx2="avx2" in flags,
                avx512="avx512f" in flags,
                avx512_bf16="avx512_bf16" in flags,
                amx_bf16="amx_bf16" in flags,
            )
    return CpuFlags()


def _cpu_flags() -> CpuFlags:
    if platform.system() == "Linux":
        return flags_from_cpuinfo(_line(Path("/proc/cpuinfo")) or "")
    if platform.system() == "Darwin":
        features = _sysctl("machdep.cpu.leaf7_features")
        if features is not None:
            words = set(features.split())
            return CpuFlags(avx2="AVX2" in words, avx512="AVX512F" in words, avx512_bf16=False, amx_bf16=False)
    return CpuFlags()


def _cpu_name() -> str:
    name: str | None = None
    if platform.system() == "Linux":
        for line in (_line(Path("/proc/cpuinfo")) or "").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                name = value.strip()
                break
    elif platform.system() == "Darwin":
        name = _sysctl("machdep.cpu.brand_string")
    return name or platform.processor() or platform.machine() or "unknown CPU"


def _sysctl(key: str) -> str | None:
    try:
        answer = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 and answer.stdout.strip() else None


def _system() -> str:
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    release = platform.release()
    if platform.system() == "Linux":
        wsl = " (WSL)" if "microsoft" in release.lower() else ""
        return f"Linux {'.'.join(release.split('-')[0].split('.')[:2])}{wsl}"
    return f"{platform.system()} {release}"
