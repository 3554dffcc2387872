"""Plans as they come about: each stage, the glance at a changed value, and runner-ups that can be taken."""

from __future__ import annotations

import statistics
import time
from typing import Any

import msgspec
import numpy as np
import pytest

from edgepeft.errors import DoesNotFit, Interrupted, UsageError
from edgepeft.memory.dry_run import DryRun, DryRunRequest
from edgepeft.models.described import described_model
from edgepeft.plan.refusal import NothingFits
from edgepeft.plan.search import make_plan
from edgepeft.plan.stages import glance, plan_in_stages
from edgepeft.plan.verify import Simulator
from edgepeft.units import GIB, MIB
from plans import device, entry, request

LENGTHS = [60, 120, 240, 480] * 50


def no_dry_run(request: DryRunRequest) -> DryRun:
    raise AssertionError("nobody asked for a dry run")


def test_a_plan_is_shown_before_its_runner_ups_and_ends_as_that_of_the_search() -> None:
    asked = request(lengths=LENGTHS)
    stages = list(plan_in_stages(asked, no_dry_run))
    assert [stage for _, stage in stages] == ["chosen", "settled"]
    assert stages[0].plan.alternatives == ()
    assert stages[-1].plan == make_plan(asked)
    assert msgspec.structs.replace(stages[-1].plan, alternatives=()) == stages[0].plan


def test_verifying_comes_after_the_closed_form() -> None:
    asked = request(lengths=LENGTHS)

    def simulate(question: DryRunRequest) -> DryRun:
        memory = make_plan(asked).memory
        return DryRun(memory, 30, (30,), 1.0, "2", "cpu")

    with_config = msgspec.structs.replace(asked, config={})
    stages = list(plan_in_stages(with_config, simulate, verify=True))
    assert [stage for _, stage in stages] == ["chosen", "compared", "settled"]
    assert stages[1].plan.dry_run is None
    assert stages[2].plan.dry_run is not None


def test_a_search_is_given_up_between_two_candidates() -> None:
    class GivenUp(Exception):
        pass

    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise GivenUp

    with pytest.raises(GivenUp):
        list(plan_in_stages(request(lengths=LENGTHS), no_dry_run, check=check))
    assert calls == 3


def test_what_does_not_fit_says_what_it_would_hold() -> None:
    with pytest.raises(DoesNotFit) as refused:
        list(plan_in_stages(request(20 * MIB, lengths=LENGTHS), no_dry_run))
    assert isinstance(refused.value, NothingFits)
    assert refused.value.memory.peak_bytes > 20 * MIB


def test_a_glance_at_what_is_planned_is_at_least_the_plan() -> None:
    asked = request(lengths=LENGTHS)
    plan = make_plan(asked)
    seen = glance(asked, plan.spec)
    assert plan.memory.peak_bytes <= seen.peak_bytes <= 1.5 * plan.memory.peak_bytes


@pytest.mark.parametrize(
    ("values", "more"),
    [
        ({"rank": 64}, True),
        ({"rank": 4}, False),
        ({"precision": "nf4"}, False),
        ({"checkpointing": "layer"}, False),
        ({"micro_batch_tokens": 64}, False),
        ({"method": "full"}, True),
        ({"method": "ia3"}, False),
    ],
)
def test_a_glance_moves_with_the_value(values: dict[str, Any], more: bool) -> None:
    asked = request(lengths=LENGTHS, checkpointing="none")
    plan = make_plan(asked)
    before = glance(asked, plan.spec).peak_bytes
    after = glance(msgspec.structs.replace(asked, overrides={**asked.overrides, **values}), plan.spec).peak_bytes
    assert after > before if more else after < before


def test_a_glance_refuses_what_a_plan_refuses() -> None:
    asked = request(lengths=LENGTHS)
    plan = make_plan(asked)
    with pytest.raises(UsageError, match="--rank"):
        glance(msgspec.structs.replace(asked, overrides={"rank": -1}), plan.spec)


def test_a_glance_at_70_billion_parameters_is_immediate() -> None:
    profile = described_model("llama-3.1-70b")
    assert profile is not None
    lengths = np.random.default_rng(0).integers(20, 2000, 8000)
    card = device("cuda", capability=(8, 6))
    asked = request(48 * GIB, lengths=lengths, base=entry(profile.shape), on=card)
    like = make_plan(request(48 * GIB, base=entry(profile.shape), on=card)).spec
    taken = []
    for rank in range(4, 64, 4):
        begin = time.process_time()
        glance(msgspec.structs.replace(asked, overrides={"rank": rank}), like)
        taken.append(time.process_time() - begin)
    assert statistics.median(taken) < 0.03


@pytest.mark.parametrize("budget", [8 * GIB, 1 * GIB])
def test_a_runner_up_is_what_its_changes_make(budget: int) -> None:
    asked = request(budget, lengths=LENGTHS)
    plan = make_plan(asked)
    taken = 0
    for other in plan.alternatives:
        assert other.changes, other.what
        if not other.fits or "method" in other.changes:
            continue
        typed = {name.replace("-", "_"): value for name, value in other.changes.items()}
        again = make_plan(msgspec.structs.replace(asked, overrides=typed))
        assert again.memory.peak_bytes == other.peak_bytes, other.what
        taken += 1
    assert taken


def test_a_cancelled_simulator_asks_nobody() -> None:
    asked = request(lengths=LENGTHS)
    plan = make_plan(asked)
    assert plan.workload is not None
    question = DryRunRequest(plan.spec, {}, plan.workload, asked.device.target)
    with Simulator() as simulator:
        simulator.cancel()
        with pytest.raises(Interrupted, match="cancelled"):
            simulator.dry_run(question)
