"""Where a run will be executed, and how much of it a run may use."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

import msgspec

from edgepeft.errors import DeviceUnusable, UsageError
from edgepeft.memory.target import Target
from edgepeft.spec import ComputeDtype
from edgepeft.units import GIB, MIB, format_gib

if TYPE_CHECKING:
    from edgepeft.hardware.snapshot import GpuSnapshot, HostSnapshot
    from edgepeft.profiles import GpuProfile

GPU_MARGIN_BYTES = 384 * MIB
"""Left free on a card beyond what is used now: a desktop opens windows while a run goes on."""
TAKEN_SHARE = 0.15
"""Part of a card that others may hold before a plan speaks of them; a desktop takes less."""
CPU_SHARE = 0.6
"""Share of the available RAM that a run on the CPU may fill with tensors; the rest is for the interpreter, the page
cache of the weights, and everybody else."""


class PlanDevice(msgspec.Struct, frozen=True):
    """A card or the CPU, as a plan sees it."""

    id: str
    """`cpu`, the UUID of a card in this machine, or the id of a profile."""
    name: str
    kind: Literal["cpu", "cuda"]
    total_bytes: int
    """All of its memory."""
    budget_bytes: int
    """What a run may use when the user says nothing."""
    budget_why: str
    """How that was found, in one line."""
    compute_dtype: ComputeDtype
    compute_why: str
    """Why products run in that dtype, in one line."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability; None on the CPU and where it is not known."""
    present: bool = True
    """Whether it is in this machine; plans can be made for cards that are not."""
    tensor_flops: float | None = None
    """Operations a second of its tensor cores, as its profile says; None where that is not known."""
    free_bytes: int | None = None
    """What is free on it now; None where it is not in this machine."""
    ram_free_bytes: int | None = None
    """RAM beside it that a run may fill; None for the CPU, and for a card that is not in this machine."""
    taken: str = ""
    """Who holds much of a card now, in words; empty when it is mostly free."""

    @property
    def target(self) -> Target:
        """The device as memory predictions know it."""
        return Target(self.kind, self.capability, expandable_segments=os.name != "nt")


def cpu_device(host: HostSnapshot) -> PlanDevice:
    """The processor with its RAM."""
    fast_bf16 = bool(host.flags.avx512_bf16 or host.flags.amx_bf16)
    why = (
        f"this CPU has {'AMX' if host.flags.amx_bf16 else 'AVX512'} instructions for bfloat16"
        if fast_bf16
        else "this CPU would have to emulate bfloat16"
    )
    return PlanDevice(
        id="cpu",
        name=host.cpu,
        kind="cpu",
        total_bytes=host.ram_usable_bytes,
        budget_bytes=round(host.ram_available_bytes * CPU_SHARE),
        budget_why=f"{CPU_SHARE:.0%} of the {format_gib(host.ram_available_bytes, digits=1)} of RAM free now",
        compute_dtype="bf16" if fast_bf16 else "fp32",
        compute_why=why,
        free_bytes=host.ram_available_bytes,
    )


def card_device(card: GpuSnapshot) -> PlanDevice:
    """A card in this machine, with what is free on it now.

    Raises:
        DeviceUnusable: the driver does not tell its memory.
    """
    if card.total_bytes is None or card.free_bytes is None:
        raise DeviceUnusable(
            f"{card.name} does not tell its memory", where="--gpu", hint="Give --budget and --gpu with a profile id"
        )
    from edgepeft.hardware.host import read_host
    from edgepeft.profiles import match_gpu

    bf16 = card.bf16 is not False
    free, total = format_gib(card.free_bytes, digits=1), format_gib(card.total_bytes, digits=1)
    margin = f"{free} of {total} free now, less a margin of {format_gib(GPU_MARGIN_BYTES)}"
    profile = match_gpu(card)
    return PlanDevice(
        id=card.uuid,
        name=card.name,
        kind="cuda",
        total_bytes=card.total_bytes,
        budget_bytes=max(0, card.free_bytes - GPU_MARGIN_BYTES),
        budget_why=margin,
        compute_dtype="bf16" if bf16 else "fp16",
        compute_why=_card_dtype_why(bf16),
        capability=card.capability,
        tensor_flops=_tensor_flops(profile),
        free_bytes=card.free_bytes,
        ram_free_bytes=round(read_host().ram_available_bytes * CPU_SHARE),
        taken=_taken(card, card.total_bytes - card.free_bytes, card.total_bytes),
    )


def profile_device(profile: GpuProfile) -> PlanDevice:
    """A card that is described by a profile."""
    memory, reserve = format_gib(profile.memory_bytes, digits=1), format_gib(profile.desktop_reserve_bytes)
    why = f"{memory}, less {reserve} for a desktop" if profile.desktop_reserve_bytes else f"all of its {memory}"
    return PlanDevice(
        id=profile.id,
        name=profile.name,
        kind="cuda",
        total_bytes=profile.memory_bytes,
        budget_bytes=profile.memory_bytes - profile.desktop_reserve_bytes,
        budget_why=why,
        compute_dtype="bf16" if profile.bf16 else "fp16",
        compute_why=_card_dtype_why(profile.bf16),
        capability=profile.capability,
        present=False,
        tensor_flops=_tensor_flops(profile),
    )


def find_device(wanted: str | None) -> PlanDevice:
    """The device for `--gpu`: `cpu`, the index or UUID of a card here, or a profile id.

    None takes the freest card of this machine, or the CPU.

    Raises:
        UsageError: nothing of that name.
        DeviceUnusable: the card does not tell its memory.
    """
    from edgepeft.hardware.nvml import read_gpus

    if wanted is not None and wanted.strip().lower() == "cpu":
        return _cpu()
    cards = read_gpus()
    if wanted is None:
        usable = [card for card in cards if card.free_bytes is not None]
        if not usable:
            return _cpu()
        return card_device(max(usable, key=lambda card: card.free_bytes or 0))
    for card in cards:
        if wanted in (card.uuid, str(card.index)):
            return card_device(card)
    from edgepeft.profiles import find_gpu, load_gpus, match_gpu

    if wanted.isdigit() or wanted.startswith("GPU-"):
        known = ", ".join(f"{card.index} ({card.name})" for card in cards) or "none"
        described = [name for name in load_gpus() if wanted in name.split("-")]
        meant = f". For a card of another machine: {' or '.join(described)}" if described else ""
        raise UsageError(f"this machine has no card {wanted}", where="--gpu", hint=f"Cards here: {known}{meant}")
    profile = find_gpu(wanted)
    here = [card for card in cards if (found := match_gpu(card)) is not None and found.id == profile.id]
    return card_device(here[0]) if here else profile_device(profile)


def check_budget(budget_bytes: int, device: PlanDevice) -> None:
    """Refuses a budget that the device cannot have.

    Raises:
        UsageError: it is larger than all memory of the device.
    """
    if budget_bytes > device.total_bytes:
        what = "RAM" if device.kind == "cpu" else "memory of the card"
        raise UsageError(
            f"{format_gib(budget_bytes)} is more than all {what}, {format_gib(device.total_bytes)}",
            where="--budget",
            hint=f"Give at most {device.total_bytes // GIB}GiB, or leave the option out",
        )


def _cpu() -> PlanDevice:
    from edgepeft.hardware.host import read_host

    return cpu_device(read_host())


def _taken(card: GpuSnapshot, used_bytes: int, total_bytes: int) -> str:
    if used_bytes < TAKEN_SHARE * total_bytes:
        return ""
    named = [
        f"{process.name} {format_gib(process.used_bytes, digits=1)}" if process.used_bytes else process.name
        for process in card.processes[:3]
    ]
    by = f" ({', '.join(named)})" if named else ""
    return f"{format_gib(used_bytes, digits=1)} of {format_gib(total_bytes, digits=1)} are held by others{by}"


def _tensor_flops(profile: GpuProfile | None) -> float | None:
    return profile.tensor_tflops * 1e12 if profile is not None and profile.tensor_tflops is not None else None


def _card_dtype_why(bf16: bool) -> str:
    return "the card has bfloat16 tensor cores" if bf16 else "cards before Ampere have no bfloat16"
