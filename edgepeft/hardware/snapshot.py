"""What this machine has, at one moment. None means that the machine does not tell: shown as `n/a`, never as 0."""

from __future__ import annotations

from typing import Literal

import msgspec

ProcessKind = Literal["compute", "graphics", "both"]
"""How a process uses a card: CUDA, a window system or a game, or both."""


class GpuProcess(msgspec.Struct, frozen=True):
    """A process that holds memory of a card."""

    pid: int
    name: str
    """Program name; `edgepeft train` and the like for our own workers."""
    kind: ProcessKind
    used_bytes: int | None = None
    """None where the driver does not tell, as on Windows desktops."""


class PcieLink(msgspec.Struct, frozen=True):
    """The way from a card to the host; idle cards lower the generation to save power."""

    generation: int | None = None
    max_generation: int | None = None
    lanes: int | None = None
    max_lanes: int | None = None


class GpuSnapshot(msgspec.Struct, frozen=True):
    """One NVIDIA card."""

    index: int
    """Position in PCI bus order, as CUDA_DEVICE_ORDER=PCI_BUS_ID counts."""
    uuid: str
    """`GPU-…`: names the card whatever the order is."""
    name: str
    """As the driver calls it."""
    total_bytes: int | None = None
    used_bytes: int | None = None
    """Includes what the driver keeps for itself."""
    free_bytes: int | None = None
    processes: tuple[GpuProcess, ...] = ()
    """Largest first."""
    driver: str | None = None
    """Driver version, such as 580.82.07."""
    cuda_driver: tuple[int, int] | None = None
    """Newest CUDA that the driver speaks, as (13, 0)."""
    capability: tuple[int, int] | None = None
    """Compute capability, as (8, 9)."""
    power_w: float | None = None
    power_limit_w: float | None = None
    temperature_c: int | None = None
    busy_fraction: float | None = None
    """Share of the last second in which a kernel ran."""
    pcie: PcieLink = PcieLink()
    display_active: bool | None = None
    """Whether a desktop lives on this card."""

    @property
    def bf16(self) -> bool | None:
        """Whether the tensor cores multiply bfloat16; emulation on older cards does not count."""
        return None if self.capability is None else self.capability >= (8, 0)


class Accelerator(msgspec.Struct, frozen=True):
    """A device other than NVIDIA's, as far as the system tells."""

    vendor: str
    name: str
    memory_bytes: int | None = None
    note: str = ""
    """What edgepeft can do with it."""


class CpuFlags(msgspec.Struct, frozen=True):
    """Instruction sets that matter for products on the CPU; None where the system does not tell."""

    avx2: bool | None = None
    avx512: bool | None = None
    avx512_bf16: bool | None = None
    amx_bf16: bool | None = None


class HostSnapshot(msgspec.Struct, frozen=True):
    """Everything around the cards."""

    system: str
    """`Linux 6.8`, `macOS 15.1` or `Windows 11`."""
    machine: str
    """Instruction set architecture: `x86_64`, `aarch64`, `arm64` or `AMD64`."""
    cpu: str
    """The CPU's name."""
    physical_cores: int | None
    logical_cores: int
    flags: CpuFlags
    ram_total_bytes: int
    ram_available_bytes: int
    """What can be taken without swapping; within the limit of a container, when there is one."""
    ram_limit_bytes: int | None
    """A container's limit (cgroup) when it lies below the RAM."""
    swap_total_bytes: int
    swap_used_bytes: int
    disk_path: str
    """Nearest existing folder to where edgepeft keeps its data."""
    disk_free_bytes: int
    nvidia_device: bool = False
    """Whether the PCI bus shows an NVIDIA display device, with or without a driver."""

    @property
    def ram_usable_bytes(self) -> int:
        """All RAM that this process may ever have."""
        return min(self.ram_total_bytes, self.ram_limit_bytes or self.ram_total_bytes)
