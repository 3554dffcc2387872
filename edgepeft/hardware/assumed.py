"""A card that is not here, as if it were: for `doctor --gpu` and plans for another machine."""

from __future__ import annotations

from edgepeft.hardware.snapshot import GpuSnapshot, PcieLink
from edgepeft.profiles import GpuProfile


def assume_gpu(profile: GpuProfile) -> GpuSnapshot:
    """What the driver would say of the profile's card with a desktop on it; what a profile cannot know stays None."""
    return GpuSnapshot(
        index=0,
        uuid="",
        name=profile.nvml_names[0],
        total_bytes=profile.memory_bytes,
        used_bytes=profile.desktop_reserve_bytes,
        free_bytes=profile.memory_bytes - profile.desktop_reserve_bytes,
        capability=profile.capability,
        power_limit_w=profile.board_power_w,
        pcie=PcieLink(max_generation=profile.pcie_generation, max_lanes=profile.pcie_lanes),
    )
