"""Parameter counts from configs, against the models that transformers builds from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from edgepeft.models.config import read_shape
from edgepeft.models.families import FAMILIES

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"tie_word_embeddings": True, "head_dim": 16},
    "qwen3": {"attention_bias": True},
    "gemma2": {"attention_bias": True},
    "granite": {"attention_bias": True, "tie_word_embeddings": True},
    "stablelm": {"use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True},
    "qwen2_moe": {"qkv_bias": False},
}
CASES = [(model_type, {}) for model_type in FAMILIES] + list(VARIANTS.items())
WITHOUT_HEAD_DIM = ("phi3", "smollm3", "olmo", "olmo2", "olmo3", "stablelm", "qwen2", "qwen2_moe")


def _build(model_type: str, changes: dict[str, Any]) -> tuple[dict[str, Any], nn.Module]:
    values = SMALL | changes
    if "moe" in model_type or model_type in ("mixtral", "gpt_oss"):
        values |= EXPERTS | ({"shared_expert_intermediate_size": 80} if model_type == "qwen2_moe" else {})
    if model_type in WITHOUT_HEAD_DIM:
        values = {key: value for key, value in values.items() if key != "head_dim"}
    config = AutoConfig.for_model(model_type, **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return config.to_dict(), model


@pytest.mark.parametrize(("model_type", "changes"), CASES)
def test_the_shape_is_what_transformers_builds(model_type: str, changes: dict[str, Any]) -> None:
    config, model = _build(model_type, changes)
    shape = read_shape(config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.architecture == type(model).__name__
    layer = model.get_submodule("model.layers.1")
    linears = {
        name: (module.in_features, module.out_features, module.bias is not None)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    assert {linear.name: (linear.in_features, linear.out_features, linear.bias) for linear in shape.linears} == linears


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name != "ministral"])
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    """A config that leaves out what transformers lets it leave out."""
    needed = {key: SMALL[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
    needed |= {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 128}
    needed |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "model_type": model_type}
    config = AutoConfig.for_model(**needed)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert read_shape(needed).parameters == sum(parameter.numel() for parameter in model.parameters())
