"""Methods that PEFT has too: its files load here and ours load there, with the same logits and gradients."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    BeftConfig,
    IA3Config,
    LNTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from edgepeft.engine.methods import attach, set_active
from edgepeft.engine.methods.files import read_adapter, save_adapter
from edgepeft.engine.model.load import LoadedModel, load_model
from edgepeft.errors import BadInput, UsageError
from edgepeft.methods import count_parameters
from edgepeft.methods.bias import BiasConfig
from edgepeft.methods.bottleneck import BottleneckConfig
from edgepeft.methods.ia3 import Ia3Config
from edgepeft.methods.norm import NormConfig
from edgepeft.methods.prefix import PrefixConfig
from edgepeft.methods.prompt import PromptConfig
from edgepeft.models.store import ensure_model
from tiny import write_tiny_model

CPU = torch.device("cpu")
IDS = torch.randint(0, 250, (2, 19), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """With biases, which one of the methods needs."""
    return write_tiny_model(tmp_path / "tiny-model", biased=True)


def load(folder: Path) -> LoadedModel:
    return load_model(ensure_model(str(folder)), precision="fp32", compute_dtype="fp32", device=CPU)


def logits(loaded: LoadedModel, *names: str) -> Tensor:
    set_active(loaded, [(name, 1.0) for name in names])
    with torch.no_grad():
        out: Tensor = loaded.model(IDS).logits
    return out


def move(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1


@pytest.mark.parametrize(
    "settings",
    [
        IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=[]),
        LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm", "norm"]),
        LNTuningConfig(target_modules=["post_attention_layernorm"]),
        BeftConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
        BeftConfig(target_modules=["v_proj", "up_proj"]),
        PrefixTuningConfig(num_virtual_tokens=7),
        PrefixTuningConfig(num_virtual_tokens=7, prefix_projection=True, encoder_hidden_size=24),
        PromptTuningConfig(num_virtual_tokens=7, prompt_tuning_init="SAMPLE_VOCAB"),
    ],
    ids=[
        *("ia3", "ia3 of results", "norm", "one norm", "bias", "offsets without a bias"),
        *("prefix", "projected prefix", "prompt"),
    ],
)
def test_pefts_adapter_loads_here_and_ours_loads_there(tiny_model: Path, tmp_path: Path, settings: Any) -> None:
    settings.task_type = "CAUSAL_LM"
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    theirs = get_peft_model(base, settings).eval()
    move(parameter for parameter in theirs.parameters() if parameter.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        # Those of trained rows before the tokens are no use here.
        expected = theirs(IDS).logits[:, -IDS.shape[1] :]
    loaded = load(tiny_model)
    adapter = read_adapter(tmp_path / "theirs", loaded, "t")
    torch.testing.assert_close(logits(loaded, "t"), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(loaded), expected, atol=1e-3)
    save_adapter(tmp_path / "ours", adapter, "tiny")
    fresh = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    back = PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(back(IDS).logits[:, -IDS.shape[1] :], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [Ia3Config(), NormConfig(), BiasConfig()], ids=["ia3", "norm", "bias"])
def test_gradients_are_pefts(tiny_model: Path, tmp_path: Path, config: Any) -> None:
    loaded = load(tiny_model)
    adapter = attach(loaded, "a", config, seed=0)
    move(adapter.named_parameters().values())
    save_adapter(tmp_path / "ours", adapter, "tiny")
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    twin = PeftModel.from_pretrained(base, tmp_path / "ours", is_trainable=True)
    set_active(loaded, [("a", 1.0)])
    for model in (loaded.model, twin):
        model(input_ids=IDS, labels=IDS).loss.backward()
    theirs = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    own = adapter.named_parameters()
    assert len(theirs) == len(own)
    for name, parameter in own.items():
        module = name.removesuffix(".ln_tuning_layers.weight").removesuffix(".ia3_l").removesuffix(".beft_bias")
        found = next(value for key, value in theirs.items() if f".{module}." in key)
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, found, rtol=1e-4, atol=1e-6)


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def change_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return apply


@pytest.mark.parametrize(
    ("config", "damage", "message"),
    [
        (Ia3Config(), change_config(target_modules="all-linear"), "must be lists"),
        (Ia3Config(), change_config(target_modules=["k_proj", "wo"]), "target 'wo' matches no linear"),
        (Ia3Config(), change_tensors(lambda tensors: tensors.popitem()), "is missing"),
        (NormConfig(), change_tensors(lambda tensors: tensors.update(other=torch.ones(3))), "other fits no layer"),
        (
            PrefixConfig(4),
            change_tensors(lambda tensors: tensors["prompt_embeddings"].fill_(float("inf"))),
            "not finite",
        ),
        (PrefixConfig(4), change_tensors(lambda tensors: tensors.pop("prompt_embeddings")), "holds no tensors"),
        (PrefixConfig(4), change_tensors(lambda tensors: tensors.update(other=torch.ones(3))), "other fits no layer"),
        (PrefixConfig(4), change_config(num_virtual_tokens=5), "is 4×128, this model needs 5×128"),
        (PrefixConfig(4), change_config(num_virtual_tokens=0), "a prefix of 0 tokens is not possible"),
        (PrefixConfig(4), change_config(num_virtual_tokens="4"), "must be a whole number"),
        (PrefixConfig(4), change_config(num_virtual_tokens=512), "leave no place in a context of 512"),
        (PrefixConfig(4), change_config(num_transformer_submodules=2), "for an encoder and a decoder"),
        (
            PromptConfig(4),
            change_tensors(lambda tensors: next(iter(tensors.values())).fill_(float("nan"))),
            "not finite",
        ),
        (PromptConfig(4), change_tensors(lambda tensors: tensors.update(other=torch.ones(3))), "other fits no layer"),
        (PromptConfig(4), change_config(num_virtual_tokens=5), "is 4×64, this model needs 5×64"),
        (PromptConfig(4), change_config(num_virtual_tokens=None), "must be a whole number"),
        (PromptConfig(4), change_config(num_virtual_tokens=600), "leave no place in a context of 512"),
        (PromptConfig(4), change_config(num_transformer_submodules=2), "for an encoder and a decoder"),
        (
            BottleneckConfig(),
            change_config(edgepeft={"type": "bottleneck", "reduction": 4.0}),
            "this model needs 16×64",
        ),
        (BottleneckConfig(), change_config(edgepeft={"type": "bottleneck", "width": 4}), "unknown field `width`"),
        (BottleneckConfig(), change_config(edgepeft=None), "Expected `object`"),
        (BottleneckConfig(), change_config(peft_type="EDGEPEFT_OTHER"), "type EDGEPEFT_OTHER, which cannot be loaded"),
        (
            BottleneckConfig(),
            change_tensors(lambda tensors: next(iter(tensors.values())).fill_(float("nan"))),
            "not finite numbers",
        ),
    ],
)
def test_a_damaged_adapter_is_refused_and_nothing_is_attached(
    tiny_model: Path, tmp_path: Path, config: Any, damage: Callable[[Path], None], message: str
) -> None:
    loaded = load(tiny_model)
    save_adapter(tmp_path, attach(loaded, "a", config, seed=0), "tiny")
    damage(tmp_path)
    with pytest.raises(BadInput, match=message):
        read_adapter(tmp_path, loaded, "b")
    assert not any("b" in site.adapters for site in loaded.sites().values())


@pytest.mark.parametrize(
    ("biased", "config", "message"),
    [
        (False, BiasConfig(), "method: this model's linear layers have no biases"),
        (False, BiasConfig(("q_proj",)), "method: this model's linear layers have no biases"),
        (True, BiasConfig(("q_proj", "up_proj")), "targets: up_proj has no bias. Biases have: k_proj, o_proj, q_proj"),
        (True, BiasConfig(("wo",)), "targets: target 'wo' matches no linear layer"),
    ],
)
def test_biases_that_are_not_there_are_refused_by_both_halves(
    tmp_path: Path, biased: bool, config: BiasConfig, message: str
) -> None:
    loaded = load(write_tiny_model(tmp_path / "model", biased=biased))
    for refused in (lambda: attach(loaded, "a", config, seed=0), lambda: count_parameters(config, loaded.shape)):
        with pytest.raises(UsageError) as caught:
            refused()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
