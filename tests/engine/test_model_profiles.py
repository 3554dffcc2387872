"""Described models, against what transformers builds from their configs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from edgepeft.models.described import ModelProfile, load_models

MODELS = load_models()


@pytest.mark.parametrize("profile", MODELS.values(), ids=MODELS.keys())
def test_a_described_model_is_what_transformers_builds_from_its_config(profile: ModelProfile) -> None:
    values = {key: value for key, value in profile.config.items() if key != "model_type"}
    config = AutoConfig.for_model(profile.config["model_type"], **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = profile.shape
    assert type(model).__name__ == profile.config["architectures"][0] == shape.architecture
    assert sum(parameter.numel() for parameter in model.parameters()) == profile.parameters
    layer = model.get_submodule(f"model.layers.{shape.layers - 1}")
    linears = {
        name: (module.in_features, module.out_features, module.bias is not None)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    assert {linear.name: (linear.in_features, linear.out_features, linear.bias) for linear in shape.linears} == linears
    assert model.get_input_embeddings().weight.shape == (shape.vocab, shape.hidden)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == shape.tied_embeddings
    assert config.max_position_embeddings == shape.context_length
