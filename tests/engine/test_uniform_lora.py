"""Adapters exported for other programs: one rank, one alpha, no patterns, and PEFT's logits as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from edgepeft.engine.combine import jobs
from edgepeft.engine.combine.outline import open_outline, shapes_of
from edgepeft.engine.combine.uniform import make_uniform, plain_config
from edgepeft.engine.methods.files import read_adapter
from edgepeft.engine.saving import save_tensors
from edgepeft.errors import BadInput, DiskProblem
from edgepeft.library.merging import Exported, ExportRequest
from edgepeft.methods import LoraConfig
from edgepeft.models.store import ModelEntry
from merging import IDS, adapted_logits, entry_of, write_adapter


@pytest.fixture
def entry(tiny_model: Path) -> ModelEntry:
    return entry_of(tiny_model)


def export(entry: ModelEntry, adapter: Path, work: Path) -> Exported:
    work.mkdir(parents=True)
    request = ExportRequest(base=entry.name, adapter=str(adapter), title="a", work=str(work), format="peft")
    return jobs.export(request, lambda *_: None)


def peft_logits(entry: ModelEntry, adapter: Path) -> Tensor:
    base = AutoModelForCausalLM.from_pretrained(entry.weights, dtype=torch.float32)
    with torch.no_grad():
        found: Tensor = PeftModel.from_pretrained(base, adapter).eval()(IDS).logits
    return found


def write_peft(folder: Path, entry: ModelEntry, **settings: Any) -> Path:
    base = AutoModelForCausalLM.from_pretrained(entry.weights, dtype=torch.float32)
    theirs = get_peft_model(base, PeftConfig(**({"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM"} | settings)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    theirs.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "rank", "alpha"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, 8, 16),
        # 16 / √8 · 8 is no whole number: all of it goes into B.
        ({"target_modules": ["q_proj"], "use_rslora": True}, 8, 8),
        ({"target_modules": ["q_proj"], "use_rslora": True, "r": 4}, 4, 32),
        ({"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 3}}, 8, 16),
        ({"target_modules": ["q_proj", "up_proj", "k_proj"], "alpha_pattern": {"q_proj": 5}}, 8, 16),
        ({"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 20}, "use_rslora": True}, 20, 20),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, 8, 16),
        ({"target_modules": r".*\.1\.mlp\.(up|down)_proj"}, 8, 16),
    ],
)
def test_pefts_logits_stay(
    entry: ModelEntry, tmp_path: Path, settings: dict[str, Any], rank: int, alpha: float
) -> None:
    adapter = write_peft(tmp_path / "theirs", entry, **settings)
    done = export(entry, adapter, tmp_path / "a" / "b")
    assert (done.rank, done.alpha) == (rank, alpha)
    expected = peft_logits(entry, adapter)
    torch.testing.assert_close(peft_logits(entry, tmp_path / "a" / "b"), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapted_logits(entry, tmp_path / "a" / "b"), expected, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "a" / "b" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (rank, alpha)
    assert isinstance(config["lora_alpha"], int)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["use_rslora"] is config["use_dora"] is False
    assert config["modules_to_save"] is None
    tensors = load_file(tmp_path / "a" / "b" / "adapter_model.safetensors")
    for name in config["target_modules"]:
        assert "." not in name
        # Every layer has the pair, so that the names say all.
        assert sum(f".{name}.lora_A." in key for key in tensors) == entry.shape.layers
    for key, tensor in tensors.items():
        assert key.endswith((".lora_A.weight", ".lora_B.weight"))
        assert tensor.shape[0 if "lora_A" in key else 1] == rank
        assert tensor.dtype == torch.float32
    assert len(tensors) == 2 * done.modules


def test_what_needs_no_folding_keeps_every_bit(entry: ModelEntry, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", entry, LoraConfig(rank=4, alpha=8.0))
    done = export(entry, adapter, tmp_path / "a" / "b")
    before, after = (load_file(p / "adapter_model.safetensors") for p in (adapter, tmp_path / "a" / "b"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key])
    assert done.notes == ()


def test_layers_that_are_filled_up_are_told(entry: ModelEntry, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", entry, LoraConfig(rank=4, targets=("layers.1.mlp.up_proj",)))
    done = export(entry, adapter, tmp_path / "a" / "b")
    assert done.modules == entry.shape.layers
    assert done.notes == ("1 linears in layers that it does not change are filled with zeros",)
    tensors = load_file(tmp_path / "a" / "b" / "adapter_model.safetensors")
    assert not tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"].any()


def test_inside_of_more_than_language_paths_are_whole(entry: ModelEntry, tmp_path: Path) -> None:
    outline = open_outline(entry)
    adapter = read_adapter(write_adapter(tmp_path / "adapter", entry), outline, "a")
    shapes = {f"model.language_model.{path}": shape for path, shape in shapes_of(outline).items()}
    adapter.updates = {f"model.language_model.{path}": update for path, update in adapter.updates.items()}
    lora = make_uniform(adapter, shapes, "a")
    assert plain_config(lora, "b")["target_modules"] == sorted(shapes)


def test_what_is_no_lora_is_refused(entry: ModelEntry, tmp_path: Path) -> None:
    adapter = read_adapter(write_adapter(tmp_path / "adapter", entry), open_outline(entry), "a")
    adapter.updates["model.layers.0.mlp.up_proj"] = object()  # type: ignore[assignment]
    with pytest.raises(BadInput, match="only LoRA can be exported"):
        make_uniform(adapter, {}, "a")


def test_a_full_disk_is_told_as_one(tmp_path: Path) -> None:
    with pytest.raises(DiskProblem, match=r"cannot be written"):
        save_tensors(tmp_path / "no such folder" / "x.safetensors", {"a": torch.zeros(2)}, hint="Free some space")
