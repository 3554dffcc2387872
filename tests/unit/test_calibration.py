"""Corrections from measured runs: what is kept, the rule, and how a prediction takes it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepeft.memory.breakdown import Breakdown, Phase
from edgepeft.memory.calibration import (
    COMPARED_RUNS,
    KEPT_RUNS,
    LIMITS,
    Correction,
    Observation,
    calibration_file,
    corrected,
    correction,
    correction_of,
    observations,
    observe,
    observed,
    uncorrected_peak_bytes,
)
from edgepeft.units import MIB
from shapes import run_spec

TORCH = "2.13.0+cpu"
LLAMA = "LlamaForCausalLM"
MEMORY = Breakdown(
    (
        Phase("load", {"frozen weights": 100 * MIB, "workspace": 10 * MIB}),
        Phase("train step", {"frozen weights": 100 * MIB, "saved activations": 150 * MIB, "gradients": 50 * MIB}),
    )
)


def seen(ratio: float = 1.0, *, run: str = "a-1", memory: Breakdown = MEMORY, **changes: Any) -> Observation:
    made = observed(
        run_spec(),
        memory,
        run=run,
        device_name="some CPU",
        torch=TORCH,
        measured_bytes=100 * MIB + round(200 * MIB * ratio),
        operations=4e12,
        seconds=8.0,
        tokens_per_second=500.0,
    )
    return msgspec.structs.replace(made, **changes)


def test_a_run_corrects_the_next_plan_of_its_device_torch_and_architecture():
    assert correction("cpu", TORCH, LLAMA) is None
    observe(seen(1.1))
    assert correction("cpu", TORCH, LLAMA) == Correction(pytest.approx(1.1), 1)
    assert correction("cpu", "2.14.0+cpu", LLAMA) is None
    assert correction("GPU-1", TORCH, LLAMA) is None
    assert correction("cpu", TORCH, "Qwen3ForCausalLM") is None
    assert correction("cpu", None, LLAMA) is None


def test_the_base_is_exact_and_takes_no_part():
    observation = seen(1.2)
    assert observation.base_bytes == 100 * MIB
    assert observation.ratio == pytest.approx(1.2)
    after = corrected(MEMORY, Correction(1.2, 1))
    assert after.peak.bytes_by_category["frozen weights"] == 100 * MIB
    assert after.peak_bytes == observation.measured_bytes
    assert after.correction == 1.2


def test_a_corrected_prediction_that_came_true_changes_nothing():
    observe(seen(1.2))
    factor = correction("cpu", TORCH, LLAMA)
    after = corrected(MEMORY, factor)
    assert uncorrected_peak_bytes(after) == MEMORY.peak_bytes
    observe(seen(1.2, run="a-2", memory=after))
    assert correction("cpu", TORCH, LLAMA) == Correction(pytest.approx(1.2), 2)


@pytest.mark.parametrize(
    ("ratios", "factor", "runs"),
    [
        ([1.1], 1.1, 1),
        ([1.1, 1.05], 1.1, 2),
        ([1.4, 1.02, 1.01], 1.02, 3),  # one outlier does not count
        ([1.4, 1.3, 1.0, 1.0, 1.0, 1.0, 1.0], 1.0, 5),  # runs of long ago are forgotten
        ([0.8], 1.0, 1),
        ([0.8, 0.8], 1.0, 2),
        ([0.9, 0.9, 0.9], 0.95, 3),
        ([0.9, 0.98, 0.99], 0.99, 3),
        ([0.1, 0.1, 0.1], 0.9, 3),
        ([9.0], 1.5, 1),
    ],
)
def test_the_rule(ratios, factor, runs):
    assert correction_of(ratios) == Correction(pytest.approx(factor), runs)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=9))
def test_a_factor_stays_within_its_limits(ratios):
    found = correction_of(ratios)
    if found is not None:
        assert LIMITS[0] <= found.factor <= LIMITS[1]
        assert 1 <= found.runs <= COMPARED_RUNS


@given(st.lists(st.floats(0.5, 2.0), min_size=3, max_size=5))
def test_lowering_is_more_careful_than_raising(ratios):
    found = correction_of(ratios)
    assert found is not None
    assert found.factor >= min(LIMITS[1], sorted(ratios)[-2])


def test_a_run_is_kept_once_and_the_oldest_are_let_go():
    for number in range(KEPT_RUNS + 5):
        observe(seen(run=f"a-{number}"))
    observe(seen(1.3, run="a-10"))
    kept = observations("cpu", TORCH, LLAMA)
    assert len(kept) == KEPT_RUNS
    assert [one.run for one in kept].count("a-10") == 1
    assert kept[-1].run == "a-10"


def test_every_architecture_of_a_device_tells_its_speed():
    observe(seen(architecture="Qwen3ForCausalLM", time="2026-01-02T00:00:00+00:00"))
    observe(seen(time="2026-01-01T00:00:00+00:00"))
    observe(seen(device="GPU-1"))
    assert [one.architecture for one in observations("cpu", TORCH)] == [LLAMA, "Qwen3ForCausalLM"]
    assert seen().operations_per_second == 5e11
    assert seen(seconds=0.0).operations_per_second is None


def test_figures_that_cannot_be_meant_correct_nothing():
    observe(seen(measured_bytes=0))
    observe(seen(run="a-2", predicted_bytes=5))
    observe(seen(1.3, run="a-3", edgepeft="0.0.1"))
    assert correction("cpu", TORCH, LLAMA) is None


@pytest.mark.parametrize("content", ["", "{", '{"cpu": 3}', "[]", '{"k": [{"device": "cpu"}]}', "\x00\xff"])
def test_a_damaged_file_is_an_empty_one(content):
    calibration_file().parent.mkdir(parents=True, exist_ok=True)
    calibration_file().write_text(content, encoding="utf-8")
    assert correction("cpu", TORCH, LLAMA) is None
    observe(seen(1.1))
    assert correction("cpu", TORCH, LLAMA) == Correction(pytest.approx(1.1), 1)


def test_a_toy_tells_nothing_about_a_large_base():
    observe(seen(1.4))
    assert correction("cpu", TORCH, LLAMA, base_bytes=200 * MIB) == Correction(pytest.approx(1.4), 1)
    assert correction("cpu", TORCH, LLAMA, base_bytes=100 * 17 * MIB) is None
    assert correction("cpu", TORCH, LLAMA, base_bytes=5 * MIB) is None


def test_reserved_bytes_are_corrected_alike():
    phase = Phase("train step", {"frozen weights": 100, "saved activations": 100}, reserved_bytes=300)
    after = corrected(Breakdown((phase,)), Correction(1.1, 1))
    assert after.peak.reserved_bytes == 320
    assert after.peak_bytes == 210
