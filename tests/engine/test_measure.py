"""The measuring worker: figures of the right size, kept in the cache, and a plain error when it cannot."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from edgepeft.engine.workers import measure as worker
from edgepeft.errors import DiskProblem
from edgepeft.hardware.measured import load_measured, measure
from edgepeft.units import MIB

CPU = torch.device("cpu")


def test_throughput_is_work_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "matmul", lambda left, right, out: time.sleep(0.01))
    flops = worker.matmul_flops(CPU, torch.float32, size=100, seconds=0.1)
    assert 0.5 * 2e6 / 0.01 < flops <= 2e6 / 0.01


@pytest.mark.parametrize(("slow", "best"), [(torch.bfloat16, "fp32"), (torch.float32, "bf16")])
def test_the_cpu_is_measured_in_the_dtype_that_it_is_fast_in(
    monkeypatch: pytest.MonkeyPatch, slow: torch.dtype, best: str
) -> None:
    def flops(device: torch.device, dtype: torch.dtype, *, size: int, seconds: float = 1.0) -> float:
        return 1e9 if dtype == slow else 1e12

    monkeypatch.setattr(worker, "matmul_flops", flops)
    assert worker.best_matmul(CPU) == (1e12, best)


def test_the_disk_is_written_and_left_clean(tmp_path: Path) -> None:
    written, _ = worker.disk_bytes_per_s(tmp_path / "new", 16 * MIB)
    assert written is not None
    assert written > 0
    assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(worker.os, "fsync", refuse)
    with pytest.raises(DiskProblem, match="disk is full"):
        worker.disk_bytes_per_s(tmp_path, 8 * MIB)


@pytest.mark.slow
def test_the_cpu_is_measured_in_a_process_of_its_own() -> None:
    phases: list[str] = []
    found = measure("cpu", phases.append)
    assert phases == ["matrix products", "copies in memory", "the disk"]
    assert found.matmul_flops > 1e8
    assert found.memory_bytes_per_s > 1e8
    assert found.host_to_device_bytes_per_s is None
    assert load_measured("cpu", torch.__version__) == found
