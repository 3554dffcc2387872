"""The dry run against real steps: torch's memory profiler says what the allocator really gave."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))

from accuracy.dry_run import FAMILIES, Case, draw, rows

from edgepeft.memory.workload import Workload
from edgepeft.methods import LoraConfig
from shapes import run_spec

HELD_OUT: dict[str, Any] = {"held_out_tokens": 130, "held_out_longest": 90, "held_out_trained": 70}


def case(family: str, layers: int, workload: Workload, *, dropout: float = 0.0, **spec: Any) -> Case:
    made = run_spec(**{"loss_chunk_tokens": 64, "rank": 8, **spec})
    recipe = msgspec.structs.replace(made.recipe, method=LoraConfig(rank=8, dropout=dropout))
    return Case(family, msgspec.structs.replace(made, recipe=recipe), workload, layers, hidden=128, vocab=900)


@pytest.mark.parametrize(
    "tried",
    [
        case("llama", 9, Workload(330, 300, 200, **HELD_OUT)),
        case("qwen3", 2, Workload(200, 100, 180, alone=True, **HELD_OUT), precision="int8", checkpointing="none"),
        case("gemma2", 2, Workload(420, 400, 100, **HELD_OUT), precision="bf16"),
        case(
            "olmo2", 3, Workload(150, 50, 150, **HELD_OUT), precision="fp32", compute_dtype="fp32", checkpointing="none"
        ),
        case("phi3", 2, Workload(128, 64, 40, **HELD_OUT), dropout=0.1),
        case("mixtral", 2, Workload(96, 64, 96, **HELD_OUT)),
        case("mixtral", 2, Workload(96, 64, 96, **HELD_OUT), precision="fp32", compute_dtype="fp32"),
    ],
    ids=lambda tried: f"{tried.family} {tried.spec.recipe.compute_dtype}",
)
def test_real_phases_take_what_the_dry_run_says(tried: Case) -> None:
    found = rows(tried)
    assert [row["phase"] for row in found] == ["load", "train step", "evaluation"]
    for row in found:
        assert row["measured_bytes"] > 200_000
        assert abs(row["error"]) <= 0.01, row


def test_the_bench_draws_every_family_and_other_cases_from_another_seed() -> None:
    assert {tried.family for tried in draw(0, len(FAMILIES))} == set(FAMILIES)
    assert draw(0, 22) == draw(0, 22)
    assert draw(0, 22) != draw(1, 22)
