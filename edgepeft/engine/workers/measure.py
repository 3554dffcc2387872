"""Worker: measures one device and the disk, and prints JSON lines: {"phase": …} as it goes, then the result.

`python -m edgepeft.engine.workers.measure --device cpu|cuda --folder FOLDER`
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from edgepeft.errors import EdgepeftError
from edgepeft.paths import disk_errors, make_folder
from edgepeft.units import MIB

_SECONDS = 1.0
"""How long each throughput is measured, after warming up."""
_DISK_BYTES = 256 * MIB


def main() -> int:
    """Measures, prints and returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    try:
        _print(_measure(torch.device(options.device), options.folder))
    except EdgepeftError as error:
        _print({"failed": str(error).rstrip(".")})
        return error.exit_code
    return 0


def _measure(device: torch.device, folder: Path) -> dict[str, object]:
    on_card = device.type == "cuda"
    _print({"phase": "matrix products"})
    flops, dtype = best_matmul(device)
    _print({"phase": "copies in memory"})
    copied = copy_bytes_per_s(device, size_bytes=(512 if on_card else 128) * MIB)
    to_device = None
    if on_card:
        _print({"phase": "copies from RAM to the card"})
        to_device = host_to_device_bytes_per_s(device, size_bytes=256 * MIB)
    _print({"phase": "the disk"})
    written, read = disk_bytes_per_s(folder, _DISK_BYTES)
    return {
        "device_name": torch.cuda.get_device_name(device) if on_card else "CPU",
        "torch": torch.__version__,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "matmul_flops": flops,
        "matmul_dtype": dtype,
        "memory_bytes_per_s": copied,
        "host_to_device_bytes_per_s": to_device,
        "disk_write_bytes_per_s": written,
        "disk_read_bytes_per_s": read,
    }


def best_matmul(device: torch.device) -> tuple[float, str]:
    """Operations a second of large products in the dtype that training computes in here, and that dtype's name."""
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if bf16 else "fp16"
        return matmul_flops(device, torch.bfloat16 if bf16 else torch.float16, size=4096), name
    full = matmul_flops(device, torch.float32, size=1024)
    # A CPU without instructions for bfloat16 emulates it, hundreds of times slower: small products tell.
    if matmul_flops(device, torch.bfloat16, size=256, seconds=_SECONDS / 10) < full:
        return full, "fp32"
    return matmul_flops(device, torch.bfloat16, size=1024), "bf16"


def matmul_flops(device: torch.device, dtype: torch.dtype, *, size: int, seconds: float = _SECONDS) -> float:
    """Operations a second of [size, size] @ [size, size]; a product counts 2·size³."""
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty(size, size, device=device, dtype=dtype)
    return 2.0 * size**3 / _seconds_each(lambda: torch.matmul(left, right, out=out), device, seconds)


def copy_bytes_per_s(device: torch.device, *, size_bytes: int, seconds: float = _SECONDS) -> float:
    """Bytes read plus bytes written a second while copying within the device's memory."""
    source = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2.0 * size_bytes / _seconds_each(lambda: target.copy_(source), device, seconds)


def host_to_device_bytes_per_s(device: torch.device, *, size_bytes: int, seconds: float = _SECONDS) -> float:
    """Bytes a second from pinned RAM to the card."""
    source = torch.zeros(size_bytes, dtype=torch.uint8).pin_memory()
    target = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    return size_bytes / _seconds_each(lambda: target.copy_(source, non_blocking=True), device, seconds)


def disk_bytes_per_s(folder: Path, size_bytes: int) -> tuple[float | None, float | None]:
    """Write (with fsync) and read throughput in `folder`; reading is None where the system's cache cannot be bypassed.

    Raises:
        DiskProblem: the folder cannot be written, or has no room.
    """
    make_folder(folder)
    with disk_errors(folder):
        block = os.urandom(8 * MIB)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".measure-") as file:
            began = time.perf_counter()
            for _ in range(size_bytes // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written = size_bytes / (time.perf_counter() - began)
            if not hasattr(os, "posix_fadvise"):
                return written, None
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            began = time.perf_counter()
            while file.read(len(block)):
                pass
            return written, size_bytes / (time.perf_counter() - began)


def _seconds_each(action: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Mean seconds of one call, over at least `seconds` and after two unmeasured calls."""
    for _ in range(2):
        action()
    _wait(device)
    count = 0
    began = time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds or count == 0:
        for _ in range(8 if device.type == "cuda" else 1):
            action()
            count += 1
        _wait(device)
    return passed / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _print(message: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
