"""Plans that were simulated: the dry run has the last word, and teaches the search what the closed form misses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgepeft.errors import BadInput, DoesNotFit
from edgepeft.memory.breakdown import Breakdown
from edgepeft.memory.calibration import base_bytes_of
from edgepeft.memory.dry_run import DryRun, DryRunRequest
from edgepeft.memory.estimate import estimate_training
from edgepeft.plan.request import PlanRequest
from edgepeft.plan.search import Search
from edgepeft.plan.simulated import plan_for, read_config
from edgepeft.plan.verify import CannotSimulateError
from edgepeft.units import MIB
from plans import entry, request
from shapes import llama_shape

SHAPE = llama_shape(layers=6)
LENGTHS = [40, 60, 90, 200, 350] * 12


class Engine:
    """Answers dry runs with the closed form times a factor, by checkpointing, beyond the base."""

    def __init__(self, layer: float = 1.0, none: float = 1.0, shape: Any = SHAPE) -> None:
        self.factors = {"layer": layer, "none": none}
        self.asked: list[DryRunRequest] = []
        self.shape = shape

    def __call__(self, request: DryRunRequest) -> DryRun:
        self.asked.append(request)
        memory = estimate_training(request.spec, self.shape, request.workload, request.target)
        factor = self.factors[request.spec.layout.checkpointing]
        phases = []
        for phase in memory.phases:
            extra = round((factor - 1) * (phase.total_bytes - base_bytes_of(phase)))
            ledger = dict(phase.bytes_by_category)
            ledger["workspace"] = ledger.get("workspace", 0) + extra
            phases.append(msgspec.structs.replace(phase, bytes_by_category=ledger, place="backward of layer 1"))
        return DryRun(Breakdown(tuple(phases)), SHAPE.layers, (2, 4), 0.1, "2.13.0", "cpu")


def asked(budget: int, **changes: Any) -> PlanRequest:
    made = request(budget, lengths=LENGTHS, base=entry(changes.pop("shape", SHAPE)), **changes)
    return msgspec.structs.replace(made, config={"model_type": "llama"})


def test_without_need_nothing_is_simulated():
    engine = Engine()
    plan = plan_for(asked(200 * MIB), engine)
    assert (engine.asked, plan.dry_run) == ([], None)


def test_verifying_adds_the_dry_run_of_the_plan():
    engine = Engine(1.01, 1.01)
    plan = plan_for(asked(200 * MIB), engine, verify=True)
    (question,) = engine.asked
    assert question.spec.layout == plan.spec.layout
    assert question.workload == plan.workload
    assert plan.dry_run is not None
    assert plan.dry_run.memory.peak_bytes <= 200 * MIB
    assert plan.memory == plan_for(asked(200 * MIB), None).memory


@pytest.mark.parametrize("factor", [1.2, 1.6])
def test_a_dry_run_above_the_budget_plans_again(factor):
    engine = Engine(factor, factor)
    first = plan_for(asked(60 * MIB), None)
    plan = plan_for(asked(60 * MIB), engine, verify=True)
    assert plan.dry_run is not None
    assert plan.dry_run.memory.peak_bytes <= 60 * MIB
    assert plan.spec.layout != first.spec.layout
    assert any("Planned again" in note for note in plan.notes)
    assert len(engine.asked) <= 5


def test_nothing_that_keeps_the_budget_is_refused():
    with pytest.raises(DoesNotFit):
        plan_for(asked(15 * MIB), Engine(3.0, 3.0), verify=True)


def test_a_plan_without_room_for_the_closed_forms_error_is_simulated():
    search = Search(asked(1 << 40))
    budget = round(1.001 * search.count(search.leanest_of_all).memory.peak_bytes)
    engine = Engine()
    plan = plan_for(asked(budget), engine)
    assert plan.dry_run is not None
    assert plan.dry_run.memory.peak_bytes <= budget
    assert plan_for(asked(budget), broken).dry_run is None
    with pytest.raises(DoesNotFit):
        plan_for(asked(budget), Engine(1.02, 1.02))


def test_a_near_refusal_is_settled_by_the_dry_run():
    search = Search(asked(1 << 40))
    smallest = search.smallest(search.least_length())
    peak = search.count(smallest).memory.peak_bytes
    budget = round(0.99 * peak)
    with pytest.raises(DoesNotFit):
        plan_for(asked(budget), None)
    plan = plan_for(asked(budget), Engine(0.95, 0.95))
    assert plan.dry_run is not None
    assert plan.dry_run.memory.peak_bytes <= budget
    confirming = Engine(1.0, 1.0)
    with pytest.raises(DoesNotFit):
        plan_for(asked(budget), confirming)
    assert confirming.asked
    far = Engine(0.5, 0.5)
    with pytest.raises(DoesNotFit):
        plan_for(asked(peak // 2), far)
    assert not far.asked


@pytest.mark.parametrize(("layer", "none"), [(1.5, 2.0), (0.7, 0.8), (1.0, 3.0)])
def test_an_unknown_architecture_takes_its_memory_from_dry_runs(layer, none):
    shape = msgspec.structs.replace(SHAPE, model_type="unheard-of", architecture="UnheardOfForCausalLM")
    engine = Engine(layer, none, shape)
    plan = plan_for(asked(60 * MIB, shape=shape), engine)
    assert plan.dry_run is not None
    assert plan.memory == plan.dry_run.memory
    assert plan.memory.peak_bytes <= 60 * MIB
    assert any("UnheardOfForCausalLM has no closed form" in note for note in plan.notes)
    assert {question.spec.layout.checkpointing for question in engine.asked} == {"layer", "none"}
    assert len(engine.asked) <= 7


def test_what_dry_runs_show_to_need_less_is_used():
    shape = msgspec.structs.replace(SHAPE, model_type="unheard-of")
    plan = plan_for(asked(30 * MIB, shape=shape), Engine(0.6, 0.6, shape))
    plain = plan_for(asked(30 * MIB), None)
    better = (plan.spec.layout.checkpointing == "none", plan.spec.layout.micro_batch_tokens)
    assert better > (plain.spec.layout.checkpointing == "none", plain.spec.layout.micro_batch_tokens)


def broken(question: DryRunRequest) -> DryRun:
    raise CannotSimulateError("it needs values")


def test_what_cannot_be_simulated_is_planned_with_more_room():
    shape = msgspec.structs.replace(SHAPE, model_type="unheard-of")
    plan = plan_for(asked(60 * MIB, shape=shape), broken)
    assert plan.dry_run is None
    assert plan.memory.uncertainty == 0.3
    assert plan.memory.peak_bytes * 1.3 <= 60 * MIB
    assert any("could not be simulated (it needs values)" in note for note in plan.notes)
    with pytest.raises(CannotSimulateError):
        plan_for(asked(60 * MIB, shape=shape), broken, verify=True)


def test_a_near_refusal_stands_where_nothing_can_be_simulated():
    search = Search(asked(1 << 40))
    needed = search.count(search.leanest_of_all).memory.peak_bytes
    with pytest.raises(DoesNotFit, match="more than the budget"):
        plan_for(asked(round(0.99 * needed)), broken)


def test_the_config_is_read_from_the_models_folder(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert read_config(tmp_path) == {"model_type": "llama"}
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(BadInput, match="not an object"):
        read_config(tmp_path)
    with pytest.raises(BadInput, match="cannot be read"):
        read_config(tmp_path / "none")
