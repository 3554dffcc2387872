"""Budgets of random tiny cases are kept for real, and a budget that is not kept would be seen."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))

from accuracy import budgets

from edgepeft.errors import DoesNotFit
from edgepeft.plan.simulated import plan_for

SEED = 3
SOME_CASE = msgspec.structs.replace(
    budgets.draw(SEED, 0),
    model=budgets.draw(SEED, 0).model | {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 260},
    lengths=[5, 12, 60],
    overrides={"max_steps": 3},
    share=1.0,
)


@pytest.fixture(autouse=True)
def _few_objects_to_look_through(monkeypatch: pytest.MonkeyPatch) -> Any:
    with budgets.own_objects():
        yield


@pytest.mark.parametrize("number", range(30))
def test_a_random_budget_is_kept_and_used_or_refused_rightly(number: int) -> None:
    row = budgets.check(budgets.draw(SEED, number))
    print(row)
    assert row["kept"], row
    assert row["error"] == 0


def test_cases_are_drawn_from_the_seed_and_all_kinds_occur() -> None:
    drawn = [budgets.draw(SEED, number) for number in range(30)]
    assert drawn == [budgets.draw(SEED, number) for number in range(30)]
    assert drawn[0] != budgets.draw(SEED + 1, 0)
    assert {case.compute_dtype for case in drawn} == {"fp32", "bf16"}
    assert {case.preset for case in drawn} == {"quality", "balanced", "speed", "prototype"}
    assert any(case.share < 0 for case in drawn)


def test_a_run_that_takes_more_than_its_budget_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "train", lambda plan, folder: (round(1.25 * plan.spec.budget_bytes), "loss"))
    row = budgets.check(SOME_CASE)
    assert not row["kept"]
    assert row["error"] == pytest.approx(-0.25, abs=0.001)
    assert "at loss" in row["reason"]


def test_a_refusal_of_what_fits_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise DoesNotFit("too large")

    monkeypatch.setattr(budgets, "plan_for", refuse)
    row = budgets.check(SOME_CASE)
    assert not row["kept"]
    assert row["error"] > 0


def test_a_plan_that_leaves_the_budget_unused_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan_poorly(request: Any, simulate: Any) -> Any:
        pinned = msgspec.structs.replace(request, overrides=request.overrides | {"rank": 8, "precision": "nf4"})
        poor = plan_for(pinned, simulate)
        return msgspec.structs.replace(poor, wants_more={"a larger rank": 1})

    monkeypatch.setattr(budgets, "plan_for", plan_poorly)
    row = budgets.check(msgspec.structs.replace(SOME_CASE, preset="quality"))
    assert not row["kept"]
    assert "fits, too" in row["reason"]
