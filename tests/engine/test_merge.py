"""Merged models: transformers makes of them what the adapter on its base is; little memory is needed; refusals."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from edgepeft.engine.combine import base_files, jobs, model_folder
from edgepeft.engine.combine import merge as merge_module
from edgepeft.engine.combine.base_files import BaseFiles
from edgepeft.engine.combine.merge import MergedWeights, changes_of
from edgepeft.engine.combine.outline import open_outline, shapes_of, trained_values
from edgepeft.engine.ledger import LiveBytes
from edgepeft.engine.methods.files import read_adapter
from edgepeft.engine.model.frozen import Workspace
from edgepeft.errors import BadInput, DiskProblem
from edgepeft.methods import LoraConfig
from edgepeft.models.headers import INDEX_NAME
from edgepeft.models.licence import read_licence
from edgepeft.models.source_folder import template_text
from edgepeft.models.store import ModelEntry
from merging import (
    CPU,
    IDS,
    TEXT,
    adapted_logits,
    entry_of,
    folder_logits,
    load,
    merge,
    request_for,
    write_adapter,
    write_base,
)
from tiny import write_tiny_model, write_tokenizer


@pytest.fixture
def entry(tiny_model: Path) -> ModelEntry:
    return entry_of(tiny_model)


@pytest.fixture
def adapter(entry: ModelEntry, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", entry)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=4),
        LoraConfig(rank=8, alpha=3.5, targets=("q_proj", "mlp.down_proj"), rank_stabilised=True),
        LoraConfig(rank=2, targets=("model.layers.1.self_attn.o_proj",), dropout=0.1),
    ],
)
def test_merged_in_float32_it_is_the_adapter_on_its_base(tmp_path: Path, tied: bool, config: LoraConfig) -> None:
    entry = entry_of(write_tiny_model(tmp_path / "base", tie_word_embeddings=tied))
    adapter = write_adapter(tmp_path / "adapter", entry, config)
    merged = merge(entry, adapter, tmp_path / "a" / "b")
    found = folder_logits(tmp_path / "a" / "b")
    torch.testing.assert_close(found, adapted_logits(entry, adapter), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, folder_logits(Path(entry.weights)), atol=1e-3)
    assert merged.changed == sum("lora_A" in name for name in load_file(adapter / "adapter_model.safetensors"))
    assert merged.drift.mean_kl < 1e-9
    assert merged.drift.top1_agreement == 1
    assert merged.drift.tokens == IDS.numel()


def test_it_is_what_peft_merges(entry: ModelEntry, adapter: Path, tmp_path: Path) -> None:
    merge(entry, adapter, tmp_path / "a" / "b")
    base = AutoModelForCausalLM.from_pretrained(entry.weights, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "b").state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_in_16_bit_every_weight_is_rounded_once(entry: ModelEntry, adapter: Path, tmp_path: Path, dtype: str) -> None:
    merge(entry, adapter, tmp_path / "a" / "exact")
    merged = merge(entry, adapter, tmp_path / "b" / "short", dtype=dtype)
    short = torch.bfloat16 if dtype == "bf16" else torch.float16
    exact = load_file(tmp_path / "a" / "exact" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "b" / "short" / "model.safetensors").items():
        assert tensor.dtype == short
        assert torch.equal(tensor, exact[name].to(short)), name
    config = json.loads((tmp_path / "b" / "short" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == str(short).removeprefix("torch.")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b" / "short").dtype == short
    assert 1e-9 < merged.drift.mean_kl < 1e-4


def test_a_sixteen_bit_base_keeps_the_bits_of_what_is_not_changed(tmp_path: Path) -> None:
    entry = entry_of(write_base(tmp_path / "base", "llama", dtype=torch.bfloat16))
    adapter = write_adapter(tmp_path / "adapter", entry, LoraConfig(rank=4, targets=("v_proj",)))
    merged = merge(entry, adapter, tmp_path / "a" / "b", dtype="bf16", precision="bf16", compute_dtype="bf16")
    before, after = (load_file(p / "model.safetensors") for p in (Path(entry.weights), tmp_path / "a" / "b"))
    different = {name for name in before if not torch.equal(before[name], after[name])}
    assert different == {f"model.layers.{layer}.self_attn.v_proj.weight" for layer in range(2)}
    assert merged.changed == 2
    assert merged.drift.mean_kl < 1e-4


# --- files ---


def test_shards_have_an_index_and_are_one_model(entry: ModelEntry, adapter: Path, tmp_path: Path) -> None:
    merge(entry, adapter, tmp_path / "a" / "one")
    merge(entry, adapter, tmp_path / "b" / "many", max_shard_bytes=100_000)
    folder = tmp_path / "b" / "many"
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((folder / INDEX_NAME).read_text())
    whole = load_file(tmp_path / "a" / "one" / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for shard in shards:
        tensors = load_file(folder / shard)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 100_000
        for name, tensor in tensors.items():
            assert index["weight_map"][name] == shard
            assert torch.equal(tensor, whole[name])
    assert torch.equal(folder_logits(folder), folder_logits(tmp_path / "a" / "one"))


def test_mixed_dtypes_lie_where_torch_can_take_them(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", dtype=torch.bfloat16)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"] = tensors["model.layers.0.input_layernorm.weight"].float()
    tensors["model.odd"] = torch.ones(3, dtype=torch.int8)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    entry = entry_of(base)
    adapter = write_adapter(tmp_path / "adapter", entry)
    files, outline = BaseFiles(entry), open_outline(entry)
    changes = changes_of(read_adapter(adapter, outline, "a"), outline, files, "a")
    merged = MergedWeights(files, changes, torch.bfloat16)
    model_folder.write_weights(tmp_path, merged, 1 << 30, lambda *_: None)
    found = load_file(tmp_path / "model.safetensors")
    assert found["model.layers.0.input_layernorm.weight"].dtype == torch.float32
    assert torch.equal(found["model.odd"], tensors["model.odd"])
    assert torch.equal(found["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])


def test_the_folder_has_what_a_model_needs(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    (base / "LICENSE.txt").write_text("do as you like")
    (base / "tokenizer.model").write_bytes(b"for other programs")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 258, "temperature": 0.6}))
    entry = entry_of(base)
    adapter = write_adapter(tmp_path / "adapter", entry)
    own = "{% for m in messages %}{{ m['content'] }}<|pad|>{% endfor %}"
    folder = tmp_path / "a" / "b"
    merge(entry, adapter, folder, template=own, stop_ids=(259,))
    assert template_text(folder) == own
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == own
    assert tokenizer("a 12")["input_ids"] == AutoTokenizer.from_pretrained(base)("a 12")["input_ids"]
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [259, 258]
    assert settings["temperature"] == 0.6
    assert (folder / "LICENSE.txt").read_text() == "do as you like"
    assert (folder / "tokenizer.model").exists()
    origin = json.loads((folder / "edgepeft_merge.json").read_text())
    assert (origin["base_fingerprint"], origin["adapter"]) == (entry.fingerprint, "a@v1")
    assert f"a@v1 merged into the original weights of base ({entry.fingerprint})" in (folder / "README.md").read_text()
    assert read_licence(folder) == entry.licence == "do as you like"
    again = entry_of(folder)
    torch.testing.assert_close(adapted_logits(entry, adapter), load(again).model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_a_template_inside_the_tokenizers_settings_is_replaced(tiny_model: Path, tmp_path: Path) -> None:
    entry = entry_of(tiny_model)
    merge(entry, write_adapter(tmp_path / "adapter", entry), tmp_path / "a" / "b", template="{{ messages }}")
    assert "chat_template" not in json.loads((tmp_path / "a" / "b" / "tokenizer_config.json").read_text())
    assert AutoTokenizer.from_pretrained(tmp_path / "a" / "b").chat_template == "{{ messages }}"


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_of_a_vision_language_model_the_other_tower_is_copied(tmp_path: Path, kind: str) -> None:
    eyes = {
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    text = {key: value for key, value in TEXT.items() if not key.endswith("_id")}
    config: Any
    if kind == "llava":
        config = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(hidden_size=64, **eyes),
            text_config=transformers.LlamaConfig(**text),
            image_token_index=259,
        )
    else:
        config = transformers.Gemma3Config(
            text_config=transformers.Gemma3TextConfig(**text),
            vision_config={"hidden_size": 64, **eyes},
            mm_tokens_per_image=4,
            image_token_index=259,
            boi_token_index=257,
            eoi_token_index=258,
        )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").write_text("{}")
    entry = entry_of(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", entry)
    merged = merge(entry, adapter, tmp_path / "a" / "b")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "a" / "b")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, adapted_logits(entry, adapter), rtol=1e-5, atol=1e-5)
    assert (merged.changed, merged.drift.mean_kl < 1e-9) == (14, True)
    before, after = (load_file(p / "model.safetensors") for p in (tmp_path / "base", tmp_path / "a" / "b"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 14
    assert not any("vision" in name for name in changed)
    assert (tmp_path / "a" / "b" / "preprocessor_config.json").exists()


def test_experts_are_copied_and_compared(tmp_path: Path) -> None:
    config = transformers.Qwen2MoeConfig(
        **TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, shared_expert_intermediate_size=64
    )
    torch.manual_seed(0)
    transformers.Qwen2MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    entry = entry_of(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", entry)
    trained = {"precision": "bf16", "compute_dtype": "bf16"}
    merged = merge(entry, adapter, tmp_path / "a" / "b", dtype="fp32", **trained)
    torch.testing.assert_close(
        folder_logits(tmp_path / "a" / "b"), adapted_logits(entry, adapter), rtol=1e-4, atol=1e-4
    )
    assert merged.drift.mean_kl < 1e-9


# --- memory ---


@pytest.mark.parametrize("into", ["original", "dequantized"])
def test_no_more_than_a_matrix_or_two_is_in_memory(tmp_path: Path, into: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    part = 1 << 18
    monkeypatch.setattr(base_files, "_PART_BYTES", part)
    monkeypatch.setattr(merge_module, "_PART_ENTRIES", part // 4)
    entry = entry_of(
        write_tiny_model(
            tmp_path / "base",
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=4,
            head_dim=64,
            vocab_size=4096,
            torch_dtype="float32",
        )
    )
    adapter = write_adapter(tmp_path / "adapter", entry)
    files, outline = BaseFiles(entry), open_outline(entry)
    shapes = shapes_of(outline)
    changes = changes_of(read_adapter(adapter, outline, "a"), outline, files, "a")
    names = {path: f"{path}.weight" for path in shapes}
    largest = max(out * inner for out, inner in shapes.values())
    total = sum(model_folder.size_of(tensor) for tensor in files.tensors.values())
    with trained_values(entry, files, names, shapes, "nf4", "bf16") as values:
        trained = {name: partial(values, path) for path, name in names.items()} if into == "dequantized" else {}
        merged = MergedWeights(files, changes, torch.float32, trained)
        with LiveBytes(CPU, others=False) as ledger:
            model_folder.write_weights(tmp_path, merged, 1 << 20, lambda *_: None)
    # Where values are those of the files, they come in parts; quantizing needs a matrix and its codes.
    bound = 6 * part if into == "original" else 2 * 4 * largest + 6 * part
    assert ledger.peak_bytes <= bound < total / 7
    # Nothing stays but the adapter, which was there before, and the map of 8-bit values.
    assert ledger.live_bytes <= (adapter / "adapter_model.safetensors").stat().st_size + 2048


def test_the_comparison_holds_a_layer_and_the_logits(tmp_path: Path) -> None:
    entry = entry_of(
        write_tiny_model(
            tmp_path / "base",
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=8,
            num_attention_heads=8,
            head_dim=64,
        )
    )
    adapter = write_adapter(tmp_path / "adapter", entry, LoraConfig(rank=2, targets=("q_proj",)))
    request = request_for(entry, adapter, tmp_path / "a" / "b")
    jobs.merge(request, lambda *_: None)
    with LiveBytes(CPU, others=False) as ledger:
        jobs.measure_drift(entry, adapter, tmp_path / "a" / "b", request.prompts, "fp32", "fp32", lambda *_: None)
    layer = 4 * entry.shape.linear_parameters_per_layer
    logits = 4 * IDS.numel() * entry.shape.vocab
    assert entry.weights_bytes > 7 * layer
    assert ledger.peak_bytes < layer + 3 * logits + (4 << 20)


# --- refusals ---


def test_values_that_are_not_finite_are_refused(entry: ModelEntry, adapter: Path, tmp_path: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    kept = tensors[name].clone()
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(BadInput, match=r"down_proj\.lora_B\.weight holds values that are not finite"):
        merge(entry, adapter, tmp_path / "a" / "b")
    tensors[name] = kept
    tensors[name][0, 0] = 1e8
    save_file(tensors, path)
    with pytest.raises(BadInput, match=r"layers\.1\.mlp\.down_proj\.weight holds values beyond the range of float16"):
        merge(entry, adapter, tmp_path / "b" / "b", dtype="fp16")


def test_a_base_that_is_not_finite_is_named(tiny_model: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = float("inf")
    save_file(tensors, tiny_model / "model.safetensors")
    entry = entry_of(tiny_model)
    with pytest.raises(BadInput, match=r"layers\.0\.mlp\.up_proj\.weight holds values that are not finite"):
        merge(entry, write_adapter(tmp_path / "adapter", entry), tmp_path / "a" / "b")


def test_too_little_room_is_told_before_anything_is_written(
    entry: ModelEntry, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1})())
    with pytest.raises(DiskProblem, match=r"are needed here, 1 B are free"):
        merge(entry, adapter, tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_an_update_that_cannot_be_part_of_a_weight_is_refused(entry: ModelEntry, adapter: Path) -> None:
    outline = open_outline(entry)
    read = read_adapter(adapter, outline, "a")
    read.updates["model.layers.0.mlp.up_proj"] = object()  # type: ignore[assignment]
    with pytest.raises(BadInput, match=r"mlp\.up_proj is a object, which cannot be merged"):
        changes_of(read, outline, BaseFiles(entry), "a")


def test_a_changed_base_is_refused(tiny_model: Path, adapter: Path, entry: ModelEntry, tmp_path: Path) -> None:
    tensors = load_file(tiny_model / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, tiny_model / "model.safetensors")
    with pytest.raises(BadInput, match="have changed since"):
        merge(entry, adapter, tmp_path / "a" / "b")


def test_the_workspace_is_that_of_training() -> None:
    # The stored copy's map of 8-bit values is compared with this one's.
    assert Workspace(CPU, torch.bfloat16).dynamic_map.shape == (256,)
