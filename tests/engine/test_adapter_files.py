"""Adapter files: ours load in peft, peft's load here, and damaged ones are refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from edgepeft.engine.methods import attach, set_active
from edgepeft.engine.methods.files import read_adapter, save_adapter
from edgepeft.engine.model.load import LoadedModel, load_model
from edgepeft.errors import BadInput
from edgepeft.methods import LoraConfig
from edgepeft.models.store import ensure_model

IDS = torch.randint(0, 250, (2, 19), generator=torch.Generator().manual_seed(5))
DOWN = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"


def load(folder: Path) -> LoadedModel:
    entry = ensure_model(str(folder))
    return load_model(entry, precision="fp32", compute_dtype="fp32", device=torch.device("cpu"))


def logits(loaded: LoadedModel, *names: str) -> Tensor:
    set_active(loaded, [(name, 1.0) for name in names])
    with torch.no_grad():
        found: Tensor = loaded.model(IDS).logits
    return found


def randomise(parameters: Any, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.fixture
def saved(tiny_model: Path, tmp_path: Path) -> Path:
    """An adapter of ours on every linear."""
    loaded = load(tiny_model)
    adapter = attach(loaded, "a", LoraConfig(rank=4), seed=0)
    randomise(adapter.named_parameters().values())
    save_adapter(tmp_path / "ours", adapter, "tiny")
    return tmp_path / "ours"


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=4),
        LoraConfig(rank=8, alpha=3.5, targets=("q_proj", "mlp.down_proj")),
        LoraConfig(rank=4, rank_stabilised=True, dropout=0.1),
        LoraConfig(rank=4, targets=("model.layers.1.self_attn.o_proj",)),
    ],
)
def test_our_adapter_loads_in_peft_with_the_same_logits(tiny_model: Path, tmp_path: Path, config: LoraConfig) -> None:
    loaded = load(tiny_model)
    adapter = attach(loaded, "a", config, seed=0)
    randomise(adapter.named_parameters().values())
    save_adapter(tmp_path / "ours", adapter, "tiny")
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    twin = PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    assert sum("lora_A" in name for name, _ in twin.named_parameters()) == len(adapter.updates)
    with torch.no_grad():
        torch.testing.assert_close(logits(loaded, "a"), twin(IDS).logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(logits(loaded), twin(IDS).logits, atol=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": r".*\.mlp\.(up|down)_proj"},
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 3}, "alpha_pattern": {"q_proj": 5}},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"layers.0.mlp.up_proj": 2}},
    ],
)
def test_pefts_adapter_loads_here_and_survives_being_saved_again(
    tiny_model: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    theirs = get_peft_model(base, PeftConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", **settings)).eval()
    randomise(parameter for parameter in theirs.parameters() if parameter.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load(tiny_model)
    with torch.no_grad():
        expected = theirs(IDS).logits
    adapter = read_adapter(tmp_path / "theirs", loaded, "t")
    torch.testing.assert_close(logits(loaded, "t"), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(loaded), expected, atol=1e-3)
    save_adapter(tmp_path / "again", adapter, "tiny")
    read_adapter(tmp_path / "again", loaded, "again")
    assert torch.equal(logits(loaded, "again"), logits(loaded, "t"))
    fresh = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        back = PeftModel.from_pretrained(fresh, tmp_path / "again").eval()(IDS).logits
    torch.testing.assert_close(back, expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_peft_trained_gives_its_logits_here(tiny_model: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    theirs = get_peft_model(base, PeftConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        losses.append(theirs(input_ids=IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    theirs.eval().save_pretrained(tmp_path / "theirs")
    loaded = load(tiny_model)
    read_adapter(tmp_path / "theirs", loaded, "t")
    with torch.no_grad():
        torch.testing.assert_close(logits(loaded, "t"), theirs(IDS).logits, rtol=1e-5, atol=1e-5)


def test_saving_and_loading_keeps_every_bit(tiny_model: Path, saved: Path) -> None:
    loaded = load(tiny_model)
    adapter = read_adapter(saved, loaded, "a")
    for name, value in load_file(saved / "adapter_model.safetensors").items():
        assert value.dtype == torch.float32
        assert torch.equal(adapter.state_dict()[name.removeprefix("base_model.model.")], value)
    assert {changed.name for changed in adapter.changed()} == set(load_file(saved / "adapter_model.safetensors"))
    save_adapter(saved.parent / "again", adapter, "tiny")
    again = (saved.parent / "again" / "adapter_model.safetensors").read_bytes()
    assert again == (saved / "adapter_model.safetensors").read_bytes()
    assert sorted(path.name for path in saved.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_the_config_says_what_peft_needs(saved: Path) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert (config["r"], config["lora_alpha"], config["bias"]) == (4, 32.0, "none")
    assert config["base_model_name_or_path"] == "tiny"
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def change_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = {name: value.clone() for name, value in load_file(path).items()}
        change(tensors)
        save_file(tensors, path)

    return rewrite


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def only_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_tensors(lambda t: t.pop(DOWN)), r"tensor model\.layers\.1\.mlp\.down_proj\.lora_B\.weight is missing"),
        (
            change_tensors(lambda t: (t.pop(DOWN), t.pop(DOWN.replace("lora_B", "lora_A")))),
            r"model\.layers\.1\.mlp\.down_proj\.lora_A\.weight is missing, though",
        ),
        (change_tensors(lambda t: t.update({DOWN: torch.ones(65, 4)})), "is 65×4, this model needs 64×4"),
        (change_tensors(lambda t: t[DOWN][0].fill_(float("nan"))), "down_proj.lora_B.weight holds values that are not"),
        (change_tensors(lambda t: t[DOWN][0].fill_(float("inf"))), "not finite"),
        (
            change_tensors(lambda t: t.update({DOWN.replace("layers.1", "layers.2"): t[DOWN].clone()})),
            r"layers\.2\.mlp\.down_proj\.lora_B\.weight fits no layer",
        ),
        (
            change_tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2, 2)})),
            "lm_head.weight fits",
        ),
        (change_tensors(lambda t: t.clear()), "holds no tensors"),
        (change_config(r=8), "this model needs 8×64"),
        (change_config(peft_type="VERA"), "type VERA, which cannot be loaded"),
        (change_config(use_dora=True), "lora_magnitude_vector is missing"),
        (change_config(use_qalora=True), "uses QALoRA"),
        (change_config(bias="all"), "trained biases"),
        (change_config(modules_to_save=["lm_head"]), "modules_to_save"),
        (change_config(init_lora_weights="pissa_niter_4"), "a base whose weights PEFT changed"),
        (change_config(r="many"), "must be numbers"),
        (change_config(lora_alpha=0), "alpha of 0"),
        (change_config(rank_pattern={"(": 3}), "rank_pattern must give a number"),
        (change_config(alpha_pattern=[8]), "alpha_pattern must give a number"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "no JSON object"),
        (lambda folder: (folder / "adapter_config.json").write_text('{"r": '), "cannot be read as JSON"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter is here"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (cut, "damaged or cut short"),
        (only_pickle, "a pickle that could run any code"),
    ],
)
def test_a_damaged_adapter_is_refused_and_nothing_is_attached(
    tiny_model: Path, saved: Path, damage: Callable[[Path], None], message: str
) -> None:
    loaded = load(tiny_model)
    damage(saved)
    with pytest.raises(BadInput, match=message) as caught:
        read_adapter(saved, loaded, "a")
    assert "\n" not in str(caught.value)
    assert str(saved) in str(caught.value)
    assert not any(linear.adapters for linear in loaded.linears().values())
