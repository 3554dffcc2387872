"""The closed form against the dry run for updates that multiply, change or form the frozen matrices of linears."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))

from accuracy.closed_form import FAMILIES, Case, compare, draw

from edgepeft.memory.breakdown import Phase
from edgepeft.memory.dry_run import DryRunRequest
from edgepeft.memory.estimate import estimate_training
from edgepeft.methods import LoraConfig
from edgepeft.methods.bias import BiasConfig
from edgepeft.methods.sparse import SparseConfig
from edgepeft.models.config import read_shape

CONFIGS: dict[str, Any] = {
    "dora": LoraConfig(rank=8, dora=True),
    "dora with dropout": LoraConfig(rank=8, dora=True, dropout=0.1, ranks={"o_proj": 16}),
    "ranks": LoraConfig(rank=8, ranks={"k_proj": 16, "down_proj": 4}),
    "bias": BiasConfig(),
    "sparse": SparseConfig(density=0.05),
    "sparse as PEFT has it": SparseConfig(rank=8, targets=("o_proj", "down_proj")),
}


def cases(config: Any) -> list[Case]:
    """A small and a wide model, on the CPU and on a card, quantized and not."""
    drawn = draw(seed=7, count=len(FAMILIES))
    found = [drawn[FAMILIES.index("qwen2")], drawn[FAMILIES.index("smollm3")]]
    return [
        msgspec.structs.replace(
            case,
            config=case.config | {"attention_bias": True},
            spec=msgspec.structs.replace(case.spec, recipe=msgspec.structs.replace(case.spec.recipe, method=config)),
        )
        for case in found
    ]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_closed_form_is_what_the_dry_run_counts(config: Any) -> None:
    chosen = cases(config)
    assert {case.target.kind for case in chosen} == {"cpu", "cuda"}
    for case in chosen:
        for row in compare(case):
            assert abs(row["error"]) < 0.002, row


@pytest.mark.parametrize("config", [SparseConfig(density=0.05), SparseConfig(rank=8)], ids=["own", "PEFT's"])
def test_saving_counts_the_places(config: Any) -> None:
    from edgepeft.engine.simulate import dry_run

    def saving(phases: tuple[Phase, ...]) -> int:
        (found,) = [phase for phase in phases if phase.name == "save"]
        return found.bytes_by_category["adapter weights"]

    case = cases(config)[0]
    predicted = estimate_training(case.spec, read_shape(case.config), case.workload, case.target)
    simulated = dry_run(DryRunRequest(case.spec, case.config, case.workload, case.target)).memory
    assert saving(predicted.phases) == saving(simulated.phases)
