"""How long a run takes: operations counted, rates from runs, measurements and profiles, and what is not known."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from edgepeft.hardware.measured import Measured, store_measured
from edgepeft.hardware.packages import read_packages
from edgepeft.memory.breakdown import Breakdown, Phase
from edgepeft.memory.calibration import observe, observed
from edgepeft.methods.lora import DORA_WORK, LoraConfig
from edgepeft.plan.search import make_plan
from edgepeft.plan.speed import (
    RECOMPUTE_SPEED,
    evaluation_operations,
    find_rate,
    relative_speed,
    say_time,
    training_operations,
)
from edgepeft.plan.workloads import StepList
from edgepeft.units import MIB
from plans import device, request
from shapes import SMOLLM2, run_spec

TORCH = read_packages().torch or ""
WEIGHTS = SMOLLM2.layers * SMOLLM2.linear_parameters_per_layer


def steps(lengths, *, trained=0, count=1, per_step=4) -> StepList:
    tokens = np.asarray(lengths, np.int64)
    return StepList(tokens, np.full(len(tokens), trained, np.int64), per_step, count, 0)


def measured(flops: float, dtype: str = "bf16") -> Measured:
    return Measured("cpu", "CPU", TORCH, "2026-11-24T10:00:00+00:00", flops, dtype, 1e10, None, None, None)


def seen(run: str, *, operations: float, seconds: float = 10.0, model: str = "model", precision: str = "bf16") -> None:
    spec = run_spec(precision=precision)
    base = msgspec.structs.replace(spec.recipe.base, model=model)
    spec = msgspec.structs.replace(spec, recipe=msgspec.structs.replace(spec.recipe, base=base))
    memory = Breakdown((Phase("train step", {"frozen weights": 100 * MIB, "saved activations": 100 * MIB}),))
    observe(
        observed(
            spec,
            memory,
            run=run,
            device_name="some CPU",
            torch=TORCH,
            measured_bytes=200 * MIB,
            operations=operations,
            seconds=seconds,
            tokens_per_second=100.0,
        )
    )


@pytest.mark.parametrize(("checkpointing", "times"), [("none", 4), ("layer", 6)])
def test_a_short_token_costs_four_operations_a_weight_and_six_with_recomputing(checkpointing, times):
    spec = run_spec(checkpointing=checkpointing, rank=1)
    found = training_operations(spec, SMOLLM2, steps([8] * 4))
    assert found / (32 * WEIGHTS) == pytest.approx(times, rel=0.02)


def test_speed_and_operations_agree_on_recomputing():
    with_it, without = (
        training_operations(run_spec(checkpointing=mode, rank=1), SMOLLM2, steps([8] * 4)) for mode in ("layer", "none")
    )
    assert without / with_it == pytest.approx(RECOMPUTE_SPEED, rel=0.01)


def test_dora_takes_longer_than_its_products():
    spec = run_spec(rank=8)
    dora = msgspec.structs.replace(spec.recipe, method=LoraConfig(rank=8, dora=True))
    lora = msgspec.structs.replace(spec.recipe, method=LoraConfig(rank=8))
    found = [
        training_operations(msgspec.structs.replace(spec, recipe=recipe), SMOLLM2, steps([8] * 4, trained=2))
        for recipe in (dora, lora)
    ]
    assert found[0] / found[1] == pytest.approx(DORA_WORK, rel=0.01)


def test_every_sample_counts_as_often_as_it_is_trained_on():
    spec = run_spec()
    lengths = [5, 10, 20, 40, 80]
    whole = training_operations(spec, SMOLLM2, steps(lengths, count=3, per_step=2))
    assert training_operations(spec, SMOLLM2, steps(lengths, count=6, per_step=2)) == pytest.approx(2 * whole)
    one_by_one = sum(
        training_operations(spec, SMOLLM2, steps(lengths, count=count, per_step=2)) * sign
        for count, sign in ((5, 1), (4, -1))
    )
    assert 0 < one_by_one < whole


def test_the_head_sees_trained_tokens_and_attention_grows_with_the_square():
    spec = run_spec(rank=1)
    head = training_operations(spec, SMOLLM2, steps([8] * 4, trained=2)) - training_operations(
        spec, SMOLLM2, steps([8] * 4)
    )
    assert head == 4 * 8 * SMOLLM2.vocab * SMOLLM2.hidden
    long = training_operations(spec, SMOLLM2, steps([4000] * 4)) / 16_000
    short = training_operations(spec, SMOLLM2, steps([40] * 4)) / 160
    assert 1.4 < long / short < 3


def test_an_evaluation_goes_forward_only_and_reads_no_more_than_it_may():
    spec = run_spec(rank=1)
    lengths, trained = np.full(500, 8, np.int64), np.zeros(500, np.int64)
    found = evaluation_operations(spec, SMOLLM2, lengths, trained)
    assert found / (200 * 8 * WEIGHTS) == pytest.approx(2, rel=0.02)


def test_more_tokens_are_faster_until_the_device_is_full():
    speeds = [relative_speed("cuda", tokens, "none", 256) for tokens in (64, 512, 4096, 8192, 20_000)]
    assert speeds == sorted(speeds)
    assert speeds[-1] == speeds[-2]
    assert relative_speed("cuda", 512, "none", 64) > relative_speed("cuda", 512, "layer", 256)


def test_what_was_never_measured_is_not_known():
    plan = make_plan(request(lengths=[100] * 50))
    assert plan.seconds is None
    (time,) = (choice for choice in plan.choices if choice.what == "time")
    assert (time.value, time.why) == ("n/a", "measure it once: edgepeft doctor --measure")
    assert plan.operations > 0
    assert all(other.seconds is None for other in plan.alternatives)


def test_a_measurement_tells_the_time_and_runs_tell_it_better():
    store_measured(measured(2e12))
    plan = make_plan(request(lengths=[100] * 50))
    assert plan.seconds is not None
    assert plan.seconds > plan.operations / 2e12
    (time,) = (choice for choice in plan.choices if choice.what == "time")
    assert "2 TFLOPS measured here on 2026-11-24" in time.why
    assert all(other.seconds for other in plan.alternatives if other.what != "full fine-tuning")
    rate = find_rate(device("cpu"), run_spec(), SMOLLM2)
    assert rate is not None
    assert rate.operations_per_second < 2e12
    seen("a-1", operations=5e12)
    rate = find_rate(device("cpu"), run_spec(), SMOLLM2)
    assert rate is not None
    assert rate.operations_per_second == 5e11


def test_runs_of_the_same_model_and_precision_tell_most():
    seen("a-1", operations=1e12, model="other", precision="nf4")
    seen("a-2", operations=2e12, model="other")
    seen("a-3", operations=3e12, seconds=0.5)  # too short to tell

    def rate() -> tuple[float, str]:
        found = find_rate(device("cpu"), run_spec(precision="bf16"), SMOLLM2)
        assert found is not None
        return found.operations_per_second, found.why

    assert rate() == (2e11, "as fast as a run here")
    seen("a-4", operations=4e12)
    seen("a-5", operations=6e12)
    assert rate() == (5e11, "as fast as 2 runs of this model here")


def test_a_card_elsewhere_is_timed_by_its_profile_and_says_so():
    spec = run_spec()
    card = device("cuda", present=False, tensor_flops=165e12)
    rate = find_rate(card, spec, SMOLLM2)
    assert rate is not None
    assert rate.assumed
    assert "assumed" in rate.why
    assert find_rate(device("cuda", present=False), spec, SMOLLM2) is None


def test_experts_are_timed_by_runs_of_their_own_model_only():
    mixture = msgspec.structs.replace(SMOLLM2, expert_parameters=10**6)
    store_measured(measured(2e12))
    seen("a-1", operations=1e12, model="other")
    assert find_rate(device("cpu"), run_spec(precision="bf16"), mixture) is None
    seen("a-2", operations=4e12)
    rate = find_rate(device("cpu"), run_spec(precision="bf16"), mixture)
    assert rate is not None
    assert rate.operations_per_second == 4e11


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (None, "n/a"),
        (3, "about 10 s"),
        (94, "about 90 s"),
        (242, "about 4 min"),
        (2290, "about 38 min"),
        (7100, "about 118 min"),
        (9000, "about 2 h 30 min"),
        (400_000, "about 4 d 15 h"),
    ],
)
def test_times_are_said_no_finer_than_they_are_known(seconds, said):
    assert say_time(seconds) == said
