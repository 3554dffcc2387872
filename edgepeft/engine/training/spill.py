"""Spilling: on Windows and under WSL a driver moves a full card's memory into RAM, slowly and without an error."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from pathlib import Path

from edgepeft.units import format_bytes, format_share

SLOW_SHARE = 1 / 3
"""Part of the run's median speed below which a step counts as slow."""
SLOW_STEPS = 4
"""Slow steps one after the other that are looked into."""
KNOWN_STEPS = 8
"""Steps of usual speed that have to be known."""
FULL_SHARE = 0.97
"""Share of a card in use from which its driver spills."""

UsedBytes = Callable[[], tuple[int, int] | None]
"""Used and total bytes of the run's card as its driver counts them; None when it does not tell."""


class SpillWatch:
    """Notices that a run became slow because its card is full; warns once.

    Args:
        used_bytes: asked after several slow steps only.
        spills: whether the driver of this system spills at all; see `driver_spills`.
    """

    def __init__(self, used_bytes: UsedBytes, *, spills: bool) -> None:
        self._used_bytes = used_bytes
        self._spills = spills
        self._usual: list[float] = []
        self._slow = 0

    def step(self, tokens_per_second: float) -> str | None:
        """Takes the speed of one more step; returns a warning for the user when the card spills."""
        if not self._spills:
            return None
        if len(self._usual) < KNOWN_STEPS or tokens_per_second >= SLOW_SHARE * statistics.median(self._usual):
            # Slow steps stay out of the median, or it would follow them down.
            self._usual = [*self._usual[-99:], tokens_per_second]
            self._slow = 0
            return None
        self._slow += 1
        if self._slow < SLOW_STEPS:
            return None
        self._slow = 0
        memory = self._used_bytes()
        if memory is None or memory[0] < FULL_SHARE * memory[1]:
            return None
        self._spills = False
        used, total = memory
        return (
            f"steps take more than {1 / SLOW_SHARE:.0f} times as long as before while {format_bytes(used)} of the "
            f"card's {format_bytes(total)} ({format_share(used / total, digits=0)}) are in use: its driver has moved "
            "memory into slow RAM. Close other programs that use the card, or stop the run, which saves, and train "
            "with a smaller --budget. In the NVIDIA Control Panel, 'CUDA - Sysmem Fallback Policy' set to 'Prefer No "
            "Sysmem Fallback' makes it an error that edgepeft recovers from"
        )


def driver_spills(system: str = os.name, version: Path = Path("/proc/version")) -> bool:
    """Whether this is Windows, or Linux under it."""
    if system == "nt":
        return True
    try:
        return "microsoft" in version.read_text(encoding="utf-8", errors="replace").lower()
    except OSError:
        return False


def card_memory(uuid: str) -> tuple[int, int] | None:
    """Used and total bytes of a card, by all processes, as NVML tells them; None when it does not."""
    from edgepeft.hardware.nvml import read_gpus

    for card in read_gpus():
        if card.uuid == uuid and card.used_bytes is not None and card.total_bytes is not None:
            return card.used_bytes, card.total_bytes
    return None
