"""Throughputs that were measured here, kept in the cache for each device and torch version."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec

from edgepeft.errors import DeviceUnusable, error_for_code
from edgepeft.paths import home, write_atomic
from edgepeft.processes import start_worker


class Measured(msgspec.Struct, frozen=True):
    """What one device and its disk did, once. None where it could not be measured."""

    device: str
    """`cpu`, or the UUID of a card."""
    device_name: str
    torch: str
    """Version that measured."""
    measured_at: str
    """ISO date and time with zone."""
    matmul_flops: float
    """Operations a second of a large product, in the dtype that training computes in."""
    matmul_dtype: str
    """`bf16`; `fp16` on cards without it, `fp32` on CPUs that would emulate it."""
    memory_bytes_per_s: float
    """Bytes read and written a second in the device's own memory while copying."""
    host_to_device_bytes_per_s: float | None
    """From pinned RAM to the card; None on the CPU."""
    disk_write_bytes_per_s: float | None
    """Written and fsynced where edgepeft keeps its data."""
    disk_read_bytes_per_s: float | None
    """Read past the system's cache; None where it cannot be bypassed."""


def measured_file() -> Path:
    """Where measurements are kept."""
    return home().cache / "measured.json"


def load_measured(device: str, torch: str | None) -> Measured | None:
    """The measurement of this device with this torch version; None when there is none."""
    return _read_all().get(_key(device, torch or ""))


def store_measured(measured: Measured) -> None:
    """Keeps one measurement beside the others.

    Raises:
        DiskProblem: the disk is full, or may not be written.
    """
    every = _read_all()
    every[_key(measured.device, measured.torch)] = measured
    write_atomic(measured_file(), json.dumps(msgspec.to_builtins(every), indent=2) + "\n")


def measure(device: str, say: Callable[[str], None]) -> Measured:
    """Measures one device in a worker process, and keeps the result. Takes a few seconds.

    Args:
        device: `cpu`, or the UUID of a card.
        say: gets what is being measured, as it begins.

    Raises:
        DeviceUnusable: the worker could not measure.
        DiskProblem: the disk is full.
    """
    folder = home().cache
    worker = start_worker(
        "measure",
        ["--device", "cpu" if device == "cpu" else "cuda", "--folder", str(folder)],
        device=device,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    result: Measured | None = None
    failure = ""
    assert worker.stdout is not None
    assert worker.stderr is not None
    try:
        for line in worker.stdout:
            message = msgspec.json.decode(line, type=dict[str, object])
            if "phase" in message:
                say(str(message["phase"]))
            elif "failed" in message:
                failure = str(message["failed"])
            else:
                result = msgspec.convert({**message, "device": device}, Measured)
        # The pipe is read after the end: the worker writes little there, far below what a pipe holds.
        complaint = worker.stderr.read().decode(errors="replace").strip()
        code = worker.wait()
    finally:
        worker.kill()
        worker.wait()
    if result is None:
        last = complaint.splitlines()[-1] if complaint else f"the worker ended with exit code {code}"
        if failure:
            raise error_for_code(code, failure, where="doctor --measure")
        raise DeviceUnusable(
            f"measuring failed: {last}", where="doctor --measure", hint="See the problems that edgepeft doctor lists"
        )
    store_measured(result)
    return result


def _key(device: str, torch: str) -> str:
    return f"{device} torch {torch}"


def _read_all() -> dict[str, Measured]:
    try:
        return msgspec.json.decode(measured_file().read_bytes(), type=dict[str, Measured])
    except (FileNotFoundError, msgspec.DecodeError):
        # A cache: what cannot be read is measured again.
        return {}
