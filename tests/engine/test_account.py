"""A run's memory as it is told: on a card all that the process holds of it, and what resident memory grows by."""

from __future__ import annotations

import os

import pytest
import torch

from edgepeft.engine.training import account as account_module
from edgepeft.engine.training.account import MemoryAccount, card_bytes_of_process
from edgepeft.engine.training.measured import MeasuredPeak
from edgepeft.engine.training.memory import resident_bytes
from edgepeft.hardware import nvml
from edgepeft.hardware.snapshot import GpuProcess, GpuSnapshot
from edgepeft.memory.breakdown import Breakdown, Phase
from edgepeft.units import MIB

PREDICTED = Breakdown((Phase("train step", {"frozen weights": 900 * MIB, "device context": 450 * MIB}),))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> MemoryAccount:
    """An account of a card that holds 1,000 MiB allocated and 1,200 reserved at most, 1,100 now."""
    for name, size in (
        ("max_memory_reserved", 1200),
        ("memory_reserved", 1100),
        ("max_memory_allocated", 1000),
        ("memory_allocated", 700),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size * MIB)
    made = MemoryAccount(torch.device("cuda"), "GPU-1", PREDICTED, None)
    made.gauge.by_category = {"frozen weights": 900 * MIB, "saved activations": 90 * MIB}
    made.gauge.place = "loss"
    made.gauge.peak_bytes = 1000 * MIB
    return made


def test_on_a_card_the_peak_is_what_the_process_holds(card: MemoryAccount, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(account_module, "card_bytes_of_process", lambda uuid: 1500 * MIB)
    event = card.event(3, "train step")
    # 1,500 held, of which the allocator has 1,100 now: the rest is the context.
    assert event.by_category == {
        "frozen weights": 900 * MIB,
        "saved activations": 90 * MIB,
        "allocator slack": 210 * MIB,
        "device context": 400 * MIB,
    }
    assert event.peak_bytes == sum(event.by_category.values()) == 1600 * MIB
    assert (event.live_bytes, event.reserved_bytes, event.place) == (700 * MIB, 1200 * MIB, "loss")
    peak = card.peak()
    assert (peak.peak_bytes, peak.live_bytes) == (1600 * MIB, 1000 * MIB)


def test_where_the_driver_does_not_tell_the_planned_context_counts(
    card: MemoryAccount, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(account_module, "card_bytes_of_process", lambda uuid: None)
    assert card.event(3, "train step").by_category["device context"] == 450 * MIB


def test_this_process_is_found_on_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(uuid: str, *pids: int) -> GpuSnapshot:
        processes = tuple(GpuProcess(pid=pid, name="x", kind="compute", used_bytes=pid) for pid in pids)
        return GpuSnapshot(
            index=0, uuid=uuid, name="Card", total_bytes=1, used_bytes=1, free_bytes=0, processes=processes
        )

    own = os.getpid()
    monkeypatch.setattr(nvml, "read_gpus", lambda: [snapshot("GPU-0", own + 1), snapshot("GPU-1", own + 1, own)])
    assert card_bytes_of_process("GPU-1") == own
    assert card_bytes_of_process("GPU-0") is None
    assert card_bytes_of_process("GPU-2") is None


def test_the_higher_of_two_processes_counts_with_its_categories() -> None:
    one = MeasuredPeak(9, {"workspace": 9}, "x", live_bytes=5, reserved_bytes=7, rss_bytes=None)
    other = MeasuredPeak(8, {"workspace": 8}, "y", live_bytes=6, reserved_bytes=None, rss_bytes=3)
    expected = MeasuredPeak(9, {"workspace": 9}, "x", live_bytes=6, reserved_bytes=7, rss_bytes=3)
    assert one.with_other(other) == other.with_other(one) == expected


@pytest.mark.skipif(resident_bytes() is None, reason="this system does not tell resident memory")
def test_resident_memory_is_seen_while_it_is_there() -> None:
    account = MemoryAccount(torch.device("cpu"), "cpu", PREDICTED, None)
    with account.sampling():
        big = torch.ones(64 * MIB // 4)
        # Longer than a look takes, whatever else the machine does.
        for _ in range(200):
            big += 1
    del big
    grown = account.peak().rss_bytes
    assert grown is not None
    assert grown >= 60 * MIB
