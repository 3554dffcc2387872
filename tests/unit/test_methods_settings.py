"""Settings of methods as people type them, and what becomes of those that cannot be meant."""

from __future__ import annotations

from typing import Any

import pytest

from edgepeft.errors import UsageError
from edgepeft.methods import LoraConfig, count_parameters, make_config, method_values
from edgepeft.models.config import read_shape
from tiny import tiny_config

SHAPE = read_shape(tiny_config())


def test_ranks_are_read_and_counted() -> None:
    config = make_config("lora", {"rank": 4, "ranks": "q_proj:2, mlp.down_proj:8", "dora": "true"})
    assert config == LoraConfig(rank=4, ranks={"q_proj": 2, "mlp.down_proj": 8}, dora=True)
    plain = count_parameters(LoraConfig(rank=4), SHAPE)
    rows = sum(linear.out_features for linear in SHAPE.adaptable)
    by_hand = plain - 2 * 2 * (64 + 64) + 4 * 2 * (128 + 64) + 2 * rows
    assert count_parameters(config, SHAPE) == by_hand


def test_settings_are_told_as_they_are_typed() -> None:
    told = method_values(LoraConfig(rank=4, ranks={"q_proj": 2, "down_proj": 8}, dora=True))
    assert (told["dora"], told["ranks"]) == ("yes", "q_proj:2, down_proj:8")
    assert make_config("lora", {"rank": 4, "ranks": told["ranks"], "dora": told["dora"] == "yes"}) == LoraConfig(
        rank=4, ranks={"q_proj": 2, "down_proj": 8}, dora=True
    )
    assert method_values(LoraConfig())["ranks"] == "none"


def test_the_longest_name_of_a_linear_counts() -> None:
    config = LoraConfig(rank=4, ranks={"self_attn.q_proj": 3, "q_proj": 2, "layers.1.self_attn.q_proj": 5})
    assert config.rank_of("model.layers.0.self_attn.q_proj") == 3
    assert config.rank_of("model.layers.1.self_attn.q_proj") == 5
    assert config.rank_of("model.layers.0.mlp.q_proj") == 2
    assert config.rank_of("model.layers.0.self_attn.eq_proj") == 4


def test_entries_are_counted_by_density_or_as_lora_of_a_rank_has_them() -> None:
    assert count_parameters(make_config("sparse", {"rank": 4}), SHAPE) == count_parameters(LoraConfig(rank=4), SHAPE)
    weights = SHAPE.layers * SHAPE.linear_parameters_per_layer
    assert count_parameters(make_config("sparse", {"density": "1"}), SHAPE) == weights
    few = make_config("sparse", {"density": "0.25", "targets": "q_proj, v_proj"})
    assert count_parameters(few, SHAPE) == SHAPE.layers * (64 * 64 + 32 * 64) // 4


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("lora", {"ranks": "q_proj"}, "--set ranks: 'q_proj' gives no value to a name"),
        ("lora", {"ranks": "q_proj:many"}, "--set ranks"),
        ("lora", {"ranks": "q_proj:0"}, "ranks: a rank of 0 for q_proj is not possible"),
        ("lora", {"ranks": "wo:4"}, "ranks: 'wo' is no linear that is targeted"),
        ("lora", {"ranks": "o_proj:4", "targets": "q_proj"}, "ranks: 'o_proj' is no linear that is targeted"),
        ("lora", {"ranks": "k_proj:33"}, "ranks: rank 33 exceeds the smaller dimension 32 of self_attn.k_proj"),
        ("lora", {"rank": "33"}, "rank: rank 33 exceeds the smaller dimension 32 of self_attn.k_proj"),
        ("lora", {"dora": "perhaps"}, "--set dora"),
        ("bias", {}, "method: this model's linear layers have no biases"),
        ("sparse", {"density": "0"}, "density: a density of 0 is not possible"),
        ("sparse", {"density": "1.1"}, "density: a density of 1.1 is not possible"),
        ("sparse", {"density": "nan"}, "density: a density of nan is not possible"),
        ("sparse", {"rank": "-1"}, "rank: a rank of -1 is not possible"),
        (
            "sparse",
            {"rank": "22"},
            "rank: rank 22 stands for 2,112 entries, and self_attn.k_proj has 2,048. Use at most 21",
        ),
        ("sparse", {"targets": "wo"}, "targets: target 'wo' matches no linear layer"),
        ("sparse", {"choose": "luck"}, "--set choose"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(method: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        count_parameters(make_config(method, settings), SHAPE)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
