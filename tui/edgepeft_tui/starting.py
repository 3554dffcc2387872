"""What is looked at once more before a run is started: memory that was free when it was planned may not be now."""

from __future__ import annotations

from edgepeft.plan.train_plan import TrainPlan
from edgepeft.units import format_bytes


def doubt_now(plan: TrainPlan) -> str:
    """Why a plan may not fit as things are now, as sentences; empty where nothing speaks against it.

    Raises:
        DeviceUnusable: its device is not in this machine.
    """
    from edgepeft.plan.device import find_device

    device = find_device(plan.spec.device)
    if not device.present or device.free_bytes is None:
        return ""
    peak = plan.memory.peak_bytes
    if peak <= device.free_bytes:
        return ""
    held = f" {device.taken}." if device.taken else ""
    return (
        f"The run needs {format_bytes(peak)}, and {format_bytes(device.free_bytes)} are free on {device.name} now."
        f"{held} Close what holds the rest, plan again with what is free, or start anyway."
    )
