"""How much memory a run may take: its budget, or less where something else has taken the memory meanwhile."""

from __future__ import annotations

import msgspec
import torch

from edgepeft.hardware.host import read_host
from edgepeft.memory.breakdown import Breakdown
from edgepeft.plan.device import GPU_MARGIN_BYTES
from edgepeft.units import MIB, format_bytes

CPU_MARGIN_BYTES = 256 * MIB
"""Left free of the RAM beyond the run's tensors: gaps of the C library's heap, the log, everybody else."""


class MemoryLimit(msgspec.Struct, frozen=True):
    """What a process of a run may take."""

    limit_bytes: int | None
    """Live tensor bytes on the CPU; on a card what the allocator may hold. None lets it take what there is."""
    lowered: bool = False
    """Whether it is less than was planned, because less is free."""
    warning: str = ""
    """Why, in a sentence; empty unless it was lowered."""


def limit_of(planned_bytes: int | None, free_bytes: int, margin_bytes: int, device: str) -> MemoryLimit:
    """The limit of a run that was planned with `planned_bytes` of memory, of which `free_bytes` are free now.

    Args:
        planned_bytes: without what the process holds already; None when the plan has no budget.
        free_bytes: free now, before the model is loaded.
        margin_bytes: kept free where the limit has to be lowered.
        device: "this machine" or the card, for the warning.
    """
    if planned_bytes is None or free_bytes >= planned_bytes:
        return MemoryLimit(planned_bytes)
    limit = max(0, free_bytes - margin_bytes)
    return MemoryLimit(
        limit,
        lowered=True,
        warning=(
            f"{format_bytes(free_bytes)} are free on {device}, less than the {format_bytes(planned_bytes)} of the "
            f"plan: the run keeps within {format_bytes(limit)} and leaves {format_bytes(margin_bytes)} to others; "
            "closing other programs gives it more when it is resumed"
        ),
    )


def limit_memory(budget_bytes: int | None, predicted: Breakdown, device: torch.device) -> MemoryLimit:
    """Reads what is free now and limits this process; on a card its allocator keeps the limit from here on.

    Args:
        budget_bytes: of the plan.
        predicted: the plan's ledger; on a card, its context is no part of what the allocator may hold.
        device: of the run. A card's context must exist already.
    """
    if device.type == "cpu":
        return limit_of(budget_bytes, read_host().ram_available_bytes, CPU_MARGIN_BYTES, "this machine")
    context_bytes = predicted.peak.bytes_by_category.get("device context", 0)
    free_bytes, _ = torch.cuda.mem_get_info(device)
    planned_bytes = None if budget_bytes is None else max(0, budget_bytes - context_bytes)
    found = limit_of(planned_bytes, free_bytes, GPU_MARGIN_BYTES, torch.cuda.get_device_name(device))
    # Without any limit, drivers on Windows let an allocation spill into slow RAM instead of refusing it.
    limit_card(device, free_bytes if found.limit_bytes is None else found.limit_bytes)
    return found


def limit_card(device: torch.device, limit_bytes: int) -> None:
    """Lets the card's allocator hold no more than `limit_bytes`; beyond them it raises its out-of-memory error."""
    _, total_bytes = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total_bytes), device)
