"""The closed form against the dry run: the small form of the bench's section, with its limits."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))

from accuracy.closed_form import FAMILIES, compare, draw
from accuracy.report import LIMITS, summarize

from edgepeft.memory.assembly import is_exact
from edgepeft.methods.prefix import PrefixConfig
from edgepeft.methods.prompt import PromptConfig
from edgepeft.models.config import read_shape


def test_the_closed_form_is_what_the_dry_run_counts():
    # One configuration of each family, more than half of them for cards.
    rows = [row for case in draw(seed=5, count=len(FAMILIES)) for row in compare(case)]
    assert {row["family"] for row in rows} == set(FAMILIES)
    assert {row["phase"] for row in rows} == {"train step", "evaluation"}
    assert LIMITS["closed_form"].broken(summarize(rows)) == []
    assert statistics.median(abs(row["error"]) for row in rows) < 0.001


@pytest.mark.parametrize(
    "config", [PrefixConfig(20), PrefixConfig(20, reparameterised=True, width=256), PromptConfig(20)]
)
def test_what_stands_before_every_sample_is_counted(config: PrefixConfig | PromptConfig):
    for case in draw(seed=7, count=4):
        samples = 9 if case.workload.tokens - case.workload.longest >= 8 else 1
        workload = msgspec.structs.replace(case.workload, samples=samples)
        recipe = msgspec.structs.replace(case.spec.recipe, method=config)
        spec = msgspec.structs.replace(case.spec, recipe=recipe)
        for row in compare(msgspec.structs.replace(case, spec=spec, workload=workload)):
            assert abs(row["error"]) < 0.001, row


def test_the_place_of_the_peak_is_the_same():
    rows = [row for case in draw(seed=6, count=3) for row in compare(case)]
    for row in rows:
        if row["phase"] == "train step":
            assert row["place_predicted"] == row["place"]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("olmo3", {}),
        ("mistral", {"sliding_window": 64}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 3}),
        ("qwen3", {}),
        ("gemma3_text", {"sliding_window_pattern": 3}),
    ],
)
def test_the_layers_with_a_window_are_those_of_transformers(family: str, changes: dict[str, Any]):
    values = {"hidden_size": 64, "num_hidden_layers": 9, "num_attention_heads": 4, "num_key_value_heads": 2}
    config: Any = AutoConfig.for_model(family, head_dim=16, intermediate_size=96, vocab_size=300, **values, **changes)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * 9
    shape = read_shape({"model_type": family, "max_position_embeddings": 512, **values, **changes} | _widths(config))
    if shape.sliding_window is None:
        assert "sliding_attention" not in kinds
    else:
        assert [number in shape.full_attention_layers for number in range(9)] == [k == "full_attention" for k in kinds]


def _widths(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("head_dim", "intermediate_size", "vocab_size")}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_the_bench_is_followed_exactly(family: str):
    case = next(case for case in draw(seed=0, count=len(FAMILIES)) if case.config["model_type"] == family)
    assert is_exact(read_shape(case.config))
