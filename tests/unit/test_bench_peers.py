"""The figures of the training bench."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))

from peers.meter import Meter
from peers.report import lines, summarize
from peers.task import Sample


def result(speed: float, *, growth: int = 100, loss: float = 1.0) -> dict[str, Any]:
    return {
        "tokens_per_second": speed,
        "growth_bytes": growth,
        "held_out_loss": loss,
        "live_peak_bytes": 110,
        "bound_bytes": 100,
    }


def test_ratios_are_made_within_a_round() -> None:
    rounds = [
        {"edgepeft-nf4": result(100), "trl-nf4": result(20, growth=1000), "peft-nf4": result(50, loss=1.5)},
        {"edgepeft-nf4": result(10), "trl-nf4": result(1, growth=400), "peft-nf4": result(4, loss=0.5)},
        {"edgepeft-nf4": result(60), "trl-nf4": result(10, growth=500)},
    ]
    found = summarize(rounds, ceiling_flops=1000.0, operations_per_token=2.0)
    assert found["speed_vs_trl"] == {"median": 6.0, "low": 5.0, "high": 10.0}
    assert found["speed_vs_peft"] == {"median": 2.25, "low": 2.0, "high": 2.5}
    assert found["memory_vs_trl"]["median"] == pytest.approx(0.2)
    assert found["loss_gap"] == {"median": 0.0, "low": -0.5, "high": 0.5}
    assert found["peak_vs_bound"]["high"] == pytest.approx(1.1)
    assert found["ceiling_share"]["median"] == pytest.approx(0.12)
    assert "speed_vs_peft_bf16" not in found
    assert any(line.startswith("speed_vs_trl") and "6.00 (5.00–10.00)" in line for line in lines(found))


def test_memory_grows_from_where_loading_begins() -> None:
    readings = iter([100, *[150, 900, 300] * 100])
    meter = Meter(lambda: next(readings))
    meter.begin()
    meter.ready()
    for _ in range(3):
        meter.step(1.0)
    while meter.peak_bytes < 900:
        pass
    meter.end()
    assert meter.growth_bytes == 800
    assert len(meter.seconds) == 3


def test_labels_are_those_that_are_trained() -> None:
    assert Sample([5, 6, 7], [False, True, False]).labels == [-100, 6, -100]
