"""Offloaded inputs in plans: for cards, where nothing else fits; on the CPU they are what `layer` is."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from edgepeft.errors import DoesNotFit
from edgepeft.memory.chunks import in_token_steps
from edgepeft.plan.device import profile_device
from edgepeft.plan.files import read_plan_toml, write_plan_toml
from edgepeft.plan.request import PlanRequest
from edgepeft.plan.search import Search, make_plan
from edgepeft.plan.speed import OFFLOAD_SPEED, relative_speed, time_run
from edgepeft.plan.train_plan import TrainPlan
from edgepeft.profiles import load_gpus
from edgepeft.units import GIB, MIB
from plans import entry, request
from shapes import LLAMA_8B

LENGTHS = [1500] * 200


def on_card(budget: int, **typed: object) -> PlanRequest:
    return request(
        budget, base=entry(LLAMA_8B), lengths=LENGTHS, on=profile_device(load_gpus()["rtx-4090-24gb"]), **typed
    )


def smallest_budget(**typed: object) -> int:
    """What the smallest plan of these options needs, its uncertainty included."""
    search = Search(on_card(1 << 40, precision="nf4", rank=8, max_seq_len=1500, micro_batch_tokens=1500, **typed))
    return search.count(search.leanest(1500, "nf4", 8)).safe_bytes


def mode(plan: TrainPlan) -> str:
    return plan.spec.layout.checkpointing


def test_it_is_chosen_for_a_card_only_where_nothing_else_fits() -> None:
    kept, moved = smallest_budget(checkpointing="layer"), smallest_budget(checkpointing="offload")
    assert kept - moved > 200 * MIB
    fixed = {"precision": "nf4", "rank": 8, "max_seq_len": 1500}
    plan = make_plan(on_card((kept + moved) // 2, **fixed))
    assert mode(plan) == "offload"
    assert plan.memory.peak_bytes <= (kept + moved) // 2
    (choice,) = (choice for choice in plan.choices if choice.what == "checkpointing")
    assert choice.origin == "auto"
    assert "assumed" in choice.why
    assert any("pinned RAM" in note for note in plan.notes)
    (other,) = (other for other in plan.alternatives if other.what == "checkpointing layer")
    assert not other.fits or "too near" in other.why
    assert plan.wants_more["inputs of layers kept on the card"] > plan.memory.peak_bytes
    for budget in (kept, 2 * kept, 4 * kept):
        assert mode(make_plan(on_card(budget, **fixed))) in ("layer", "none")


def test_it_needs_room_in_the_ram() -> None:
    kept, moved = smallest_budget(checkpointing="layer"), smallest_budget(checkpointing="offload")
    needed = 2 * 32 * 4096 * in_token_steps(1500)
    fixed = {"precision": "nf4", "rank": 8, "max_seq_len": 1500}
    tight = on_card((kept + moved) // 2, **fixed)

    def with_ram(size: int) -> PlanRequest:
        return msgspec.structs.replace(tight, device=msgspec.structs.replace(tight.device, ram_free_bytes=size))

    assert mode(make_plan(with_ram(needed))) == "offload"
    # Without, the plan comes nearer to its budget than it would like to.
    assert mode(make_plan(with_ram(needed - 1))) == "layer"


def test_it_makes_room_for_what_counts_more() -> None:
    without = make_plan(on_card(8 * GIB, checkpointing="layer"))
    found = make_plan(on_card(8 * GIB))
    quality = [
        (plan.spec.recipe.max_seq_len, plan.spec.recipe.precision != "nf4", plan.spec.recipe.method.rank)
        for plan in (without, found)
    ]
    assert quality[0] <= quality[1]


def test_on_the_cpu_it_is_layer_and_never_chosen() -> None:
    for budget in (400, 500, 700, 1000, 3000):
        try:
            assert mode(make_plan(request(budget * MIB, lengths=[300] * 100))) != "offload"
        except DoesNotFit:
            continue
    layer, offload = (
        make_plan(request(8 * GIB, lengths=[300] * 100, checkpointing=one)) for one in ("layer", "offload")
    )
    assert layer.memory == offload.memory
    assert layer.seconds == offload.seconds
    assert any("offload is layer" in note for note in offload.notes)
    assert not any("offload is layer" in note for note in layer.notes)


def test_its_speed_is_an_assumed_share() -> None:
    assert relative_speed("cuda", 4096, "offload", 256) == pytest.approx(
        OFFLOAD_SPEED * relative_speed("cuda", 4096, "layer", 256)
    )
    assert relative_speed("cpu", 4096, "offload", 256) == relative_speed("cpu", 4096, "layer", 256)
    seconds = []
    for one in ("layer", "offload"):
        asked = on_card(24 * GIB, checkpointing=one, precision="nf4")
        plan = make_plan(asked)
        assert asked.lengths is not None
        time = time_run(plan.spec, LLAMA_8B, asked.device, asked.lengths, asked.entry)
        assert time is not None
        assert time.seconds is not None
        seconds.append(time.seconds)
    assert 1 < seconds[1] / seconds[0] <= 1 / OFFLOAD_SPEED


def test_a_plan_file_keeps_it(tmp_path: Path) -> None:
    plan = make_plan(on_card(24 * GIB, checkpointing="offload", optimizer="adamw8bit", lora_plus_ratio=4.0))
    write_plan_toml(plan, tmp_path / "p.toml")
    assert read_plan_toml(tmp_path / "p.toml") == plan
    assert mode(plan) == "offload"
