"""Every method that merges: the weights of a plain float64 formula over its file, and the logits of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from edgepeft.engine.combine import jobs
from edgepeft.engine.combine.base_files import BaseFiles
from edgepeft.engine.combine.drift import _reference_logits, measure_drift
from edgepeft.engine.combine.gguf_model import GgufModel
from edgepeft.engine.combine.merge import MergedWeights, changes_of
from edgepeft.engine.combine.model_folder import write_weights
from edgepeft.engine.combine.outline import open_outline
from edgepeft.engine.ledger import LiveBytes, lie_in_files
from edgepeft.engine.methods import attach
from edgepeft.engine.methods.adapter import Mergeable
from edgepeft.engine.methods.files import read_adapter
from edgepeft.errors import BadInput
from edgepeft.library.merging import ExportRequest
from edgepeft.methods import METHODS, LoraConfig, MethodConfig, id_of
from edgepeft.methods.bias import BiasConfig
from edgepeft.methods.bottleneck import BottleneckConfig
from edgepeft.methods.compacter import CompacterConfig
from edgepeft.methods.full import FullConfig
from edgepeft.methods.ia3 import Ia3Config
from edgepeft.methods.norm import NormConfig
from edgepeft.methods.prefix import PrefixConfig
from edgepeft.methods.prompt import PromptConfig
from edgepeft.methods.sparse import SparseConfig
from edgepeft.models.store import ModelEntry
from merging import (
    CPU,
    IDS,
    PROMPTS,
    TEXT,
    adapted_logits,
    entry_of,
    folder_logits,
    load,
    merge,
    write_adapter,
    write_base,
)
from tiny import write_tiny_model, write_tokenizer

METHOD_CONFIGS: dict[str, MethodConfig] = {
    "lora": LoraConfig(rank=4, alpha=6.0),
    "dora": LoraConfig(rank=4, alpha=6.0, dora=True),
    "ia3": Ia3Config(),
    "ia3 of results": Ia3Config(outputs=("q_proj", "up_proj", "down_proj"), inputs=("o_proj",)),
    "norm": NormConfig(),
    "bias": BiasConfig(),
    "sparse": SparseConfig(density=0.05),
    "sparse as PEFT has it": SparseConfig(rank=2, choose="random", targets=("q_proj", "o_proj", "down_proj")),
    "full": FullConfig(),
}
OTHERS: dict[str, MethodConfig] = {
    "bottleneck": BottleneckConfig(reduction=8),
    "compacter": CompacterConfig(reduction=4, products=4),
    "prefix": PrefixConfig(5),
    "prompt": PromptConfig(5, "random"),
}
BASES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "attention_bias": True},
    "qwen2": {"tie_word_embeddings": False},
    "gemma3": {},
}
each_method = pytest.mark.parametrize("method", METHOD_CONFIGS)
PREFIX = "base_model.model."


def base_of(tmp_path: Path, kind: str, **changes: Any) -> ModelEntry:
    return entry_of(write_base(tmp_path / "base", kind, **(BASES[kind] | changes)))


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def expected(base: dict[str, Tensor], adapter: Path) -> dict[str, Tensor]:
    """The merged weights in float64, by each method's formula over the values of its file."""
    found = {name: tensor.double() for name, tensor in base.items()}
    config = json.loads((adapter / "adapter_config.json").read_text())
    by_site: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(adapter / "adapter_model.safetensors").items():
        site, mark, name = key.removeprefix(PREFIX).partition(".lora_")
        if not mark:
            site, _, name = key.removeprefix(PREFIX).rpartition(".")
        if "ln_tuning_layers" in site:
            site, name = site.removesuffix(".ln_tuning_layers"), f"ln_tuning_layers.{name}"
        by_site.setdefault(site, {})[name] = tensor.double() if tensor.is_floating_point() else tensor.long()
    for site, own in by_site.items():
        weight, bias = f"{site}.weight", f"{site}.bias"
        match config["peft_type"]:
            case "LORA":
                found[weight] = found[weight] + config["lora_alpha"] / config["r"] * own["B.weight"] @ own["A.weight"]
                if config["use_dora"]:
                    found[weight] *= (own["magnitude_vector"] / found[weight].norm(dim=1))[:, None]
            case "IA3":
                factors = own["ia3_l"]
                found[weight] = found[weight] * factors
                if factors.shape[1] == 1 and bias in found:
                    found[bias] = found[bias] * factors[:, 0]
            case "LN_TUNING":
                found[weight] = own["ln_tuning_layers.weight"]
            case "BEFT":
                found[bias] = found[bias] + own["beft_bias"][0]
            case "SHIRA":
                rows, columns = own["shira_indices"]
                found[weight][rows, columns] += own["shira_weight"]
            case "EDGEPEFT_SPARSE":
                found[weight].view(-1)[own["sparse_places"]] += own["sparse_values"]
            case _:
                assert config["peft_type"] == "EDGEPEFT_FULL"
                found |= {f"{site}.{name}": value for name, value in own.items()}
    return found


@each_method
@pytest.mark.parametrize("kind", BASES)
def test_merged_in_float32_it_is_the_adapter_on_its_base(tmp_path: Path, kind: str, method: str) -> None:
    if method == "bias" and kind == "gemma3":
        pytest.skip("has no biases")
    entry = base_of(tmp_path, kind)
    adapter = write_adapter(tmp_path / "adapter", entry, METHOD_CONFIGS[method])
    folder = tmp_path / "a" / "b"
    merged = merge(entry, adapter, folder)
    before, after = weights_of(Path(entry.weights)), weights_of(folder)
    assert after.keys() == before.keys()
    for name, tensor in expected(before, adapter).items():
        torch.testing.assert_close(after[name].double(), tensor, rtol=2e-6, atol=1e-7, msg=name)
    assert merged.changed == sum(not torch.equal(before[name], after[name]) for name in before)
    assert merged.tensors == len(before)
    logits = adapted_logits(entry, adapter)
    torch.testing.assert_close(folder_logits(folder), logits, rtol=1e-4, atol=1e-4)
    # The comparison's own model is the adapter on its base, not the base.
    seen = _reference_logits(entry, adapter, IDS, "fp32", "fp32", lambda *_: None)
    torch.testing.assert_close(seen, logits, rtol=1e-4, atol=1e-4)
    from_base = measure_drift(entry, adapter, Path(entry.weights), PROMPTS, "fp32", "fp32", lambda *_: None)
    assert merged.drift.mean_kl < 1e-9 < 1e-5 < from_base.mean_kl
    record = json.loads((folder / "edgepeft_merge.json").read_text())
    assert (record["method"], record["changed_tensors"]) == (id_of(METHOD_CONFIGS[method]), merged.changed)


@each_method
def test_what_learned_on_nf4_goes_into_its_values(tmp_path: Path, method: str) -> None:
    entry = entry_of(write_tiny_model(tmp_path / "base", biased=True))
    adapter = write_adapter(tmp_path / "adapter", entry, METHOD_CONFIGS[method])
    if method == "full":
        pytest.skip("takes no quantized base")
    trained: Any = {"precision": "nf4", "compute_dtype": "fp32"}
    merged = merge(entry, adapter, tmp_path / "a" / "b", into="dequantized", **trained)
    base = weights_of(Path(entry.weights))
    for path, linear in load(entry, "nf4").linears().items():
        base[f"{path}.weight"] = linear.weight_source.materialize(torch.empty(linear.weight_source.shape))
    after = weights_of(tmp_path / "a" / "b")
    for name, tensor in expected(base, adapter).items():
        torch.testing.assert_close(after[name].double(), tensor, rtol=2e-6, atol=1e-7, msg=name)
    torch.testing.assert_close(
        folder_logits(tmp_path / "a" / "b"), adapted_logits(entry, adapter, "nf4"), rtol=1e-4, atol=1e-4
    )
    assert merged.drift.mean_kl < 1e-9
    # All linears, and the norms or biases that the method changes beside them.
    assert merged.changed == 14 + {"norm": 5, "bias": 8, "ia3": 4, "ia3 of results": 2}.get(method, 0)


@each_method
def test_matrices_in_parts_are_the_same(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = base_of(tmp_path, "qwen2")
    adapter = write_adapter(tmp_path / "adapter", entry, METHOD_CONFIGS[method])
    merge(entry, adapter, tmp_path / "a" / "whole")
    monkeypatch.setattr("edgepeft.engine.combine.merge._PART_ENTRIES", 7 * 64)
    monkeypatch.setattr("edgepeft.engine.combine.base_files._PART_BYTES", 4 * 30 * 64)
    merge(entry, adapter, tmp_path / "b" / "parts")
    whole = weights_of(tmp_path / "a" / "whole")
    for name, tensor in weights_of(tmp_path / "b" / "parts").items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("method", ["dora", "norm", "full"])
def test_sixteen_bits_are_rounded_once_and_the_rest_is_the_bases(tmp_path: Path, method: str) -> None:
    entry = base_of(tmp_path, "gemma3", dtype=torch.bfloat16)
    adapter = write_adapter(tmp_path / "adapter", entry, METHOD_CONFIGS[method])
    folder = tmp_path / "a" / "b"
    merged = merge(entry, adapter, folder, dtype="bf16", precision="bf16", compute_dtype="bf16")
    before, after = weights_of(Path(entry.weights)), weights_of(folder)
    changed = 0
    for name, tensor in expected(before, adapter).items():
        same = torch.equal(before[name].double(), tensor)
        changed += not same
        torch.testing.assert_close(after[name], before[name] if same else tensor.bfloat16(), msg=name)
    assert merged.changed == changed
    assert merged.drift.mean_kl < 1e-3


# --- memory ---


@pytest.mark.parametrize("method", ["dora", "ia3", "sparse", "norm", "full"])
@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_tensors_go_by_parts(tmp_path: Path, method: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables, too: the largest tensor here is never in memory as a whole."""
    part = 1 << 17
    monkeypatch.setattr("edgepeft.engine.combine.base_files._PART_BYTES", part)
    monkeypatch.setattr("edgepeft.engine.combine.merge._PART_ENTRIES", part // 4)
    monkeypatch.setattr("edgepeft.engine.methods.adapter._PART_ENTRIES", part // 4)
    entry = base_of(tmp_path, "qwen2", hidden_size=256, intermediate_size=512, vocab_size=4096)
    file = write_adapter(tmp_path / "adapter", entry, METHOD_CONFIGS[method]) / "adapter_model.safetensors"
    files, outline = BaseFiles(entry), open_outline(entry)
    with LiveBytes(CPU, others=False) as ledger:
        adapter = read_adapter(file.parent, outline, "a")
    # As the file has them: what is as large as the base is not copied out of it.
    assert ledger.peak_bytes < file.stat().st_size * (1.2 if method == "full" else 6) + (1 << 16)
    merged = MergedWeights(files, changes_of(adapter, outline, files, "a"), torch.float32)
    model = GgufModel(entry, merged, "f16", title="t", adapter="a", template=None, stop_ids=())
    with LiveBytes(CPU, others=False) as ledger:
        lie_in_files(tensor for update in adapter.updates.values() for tensor in update.named_tensors().values())
        if form == "folder":
            write_weights(tmp_path, merged, 1 << 20, lambda *_: None)
        else:
            model.write(tmp_path / "model.gguf", lambda *_: None)
    assert ledger.peak_bytes < 8 * part < 4 * 256 * 4096 / 3


# --- GGUF ---


@pytest.mark.parametrize(
    ("kind", "method"),
    [("qwen2", method) for method in METHOD_CONFIGS]
    + [(kind, method) for kind in ("gemma3", "llama") for method in ("norm", "full", "dora", "ia3 of results")],
)
def test_a_gguf_file_holds_it(tmp_path: Path, kind: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # llama.cpp has no biases in its Llama.
    entry = base_of(tmp_path, kind, **({"attention_bias": False} if kind == "llama" else {}))
    adapter = write_adapter(tmp_path / "adapter", entry, METHOD_CONFIGS[method])
    kept: list[Path] = []
    monkeypatch.setattr("edgepeft.engine.combine.jobs.shutil.rmtree", kept.append)
    merged = merge(entry, adapter, tmp_path / "a" / "b", format="gguf-f16")
    (read_back,) = kept
    tensors = weights_of(read_back)
    for name, tensor in expected(weights_of(Path(entry.weights)), adapter).items():
        # The file's 16 bits, then those of the model that our loader makes of it.
        torch.testing.assert_close(tensors[name].double(), tensor, rtol=2**-8 + 2**-10, atol=1e-4)
    assert merged.drift.mean_kl < 1e-3
    from_base = measure_drift(entry, adapter, Path(entry.weights), PROMPTS, "fp32", "fp32", lambda *_: None)
    assert merged.drift.mean_kl < from_base.mean_kl / 20


def test_q8_0_holds_norms_and_tables(tmp_path: Path) -> None:
    entry = base_of(tmp_path, "gemma3")
    adapter = write_adapter(tmp_path / "adapter", entry, FullConfig())
    merged = merge(entry, adapter, tmp_path / "a" / "b", format="gguf-q8_0")
    assert merged.drift.mean_kl < 0.02
    from_base = measure_drift(entry, adapter, Path(entry.weights), PROMPTS, "fp32", "fp32", lambda *_: None)
    assert from_base.mean_kl > 0.1


# --- names and files ---


@pytest.mark.parametrize("method", ["norm", "full", "dora"])
def test_the_language_tower_of_a_vision_model_is_found(tmp_path: Path, method: str) -> None:
    eyes = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}
    text = {key: value for key, value in TEXT.items() if not key.endswith("_id")}
    config: Any = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(hidden_size=64, patch_size=14, **eyes),
        text_config=transformers.LlamaConfig(**text),
        image_token_index=259,
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").write_text("{}")
    entry = entry_of(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", entry, METHOD_CONFIGS[method])
    merged = merge(entry, adapter, tmp_path / "a" / "b")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "a" / "b")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, adapted_logits(entry, adapter), rtol=1e-4, atol=1e-4)
    before, after = (weights_of(folder) for folder in (tmp_path / "base", tmp_path / "a" / "b"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == merged.changed == {"norm": 5, "full": 21, "dora": 14}[method]
    assert not any("vision" in name for name in changed)


def test_a_tied_head_that_is_in_the_files_too_is_replaced_with_the_embedding(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base = write_base(tmp_path / "base", "llama", tie_word_embeddings=True)
    tensors = weights_of(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    entry = entry_of(base)
    adapter = write_adapter(tmp_path / "adapter", entry, FullConfig())
    merged = merge(entry, adapter, tmp_path / "a" / "b")
    after = weights_of(tmp_path / "a" / "b")
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], tensors["lm_head.weight"])
    assert merged.changed == merged.tensors == len(tensors)


@pytest.mark.parametrize("table", ["model.embed_tokens", "lm_head"])
def test_one_table_for_both_is_not_changed_for_one(tmp_path: Path, table: str) -> None:
    entry = base_of(tmp_path, "llama")
    files, outline = BaseFiles(entry), open_outline(entry)
    read = read_adapter(write_adapter(tmp_path / "adapter", entry, FullConfig()), outline, "a")
    assert len(changes_of(read, outline, files, "a")) == len(files.tensors)
    kept = read.updates.pop(table)
    with pytest.raises(BadInput, match="this base has one table for both"):
        changes_of(read, outline, files, "a")
    read.updates = {table: kept}
    with pytest.raises(BadInput, match="this base has one table for both"):
        changes_of(read, outline, files, "a")


@pytest.mark.parametrize("method", ["ia3", "norm", "dora", "sparse as PEFT has it"])
def test_peft_merges_the_same(tmp_path: Path, method: str) -> None:
    from peft import PeftModel

    entry = base_of(tmp_path, "qwen2")
    adapter = write_adapter(tmp_path / "adapter", entry, METHOD_CONFIGS[method])
    merge(entry, adapter, tmp_path / "a" / "b")
    model = AutoModelForCausalLM.from_pretrained(entry.weights, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "b").state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6, msg=name)


# --- exports ---


@pytest.mark.parametrize("method", ["dora", "ia3", "norm", "bias", "sparse as PEFT has it", "prefix", "prompt"])
def test_an_export_for_peft_is_the_adapter_as_peft_has_it(tmp_path: Path, method: str) -> None:
    from peft import PeftModel

    entry = base_of(tmp_path, "qwen2")
    adapter = write_adapter(tmp_path / "adapter", entry, (METHOD_CONFIGS | OTHERS)[method])
    work = tmp_path / "out"
    work.mkdir()
    request = ExportRequest(entry.name, str(adapter), "t", str(work), "peft")
    exported = jobs.export(request, lambda *_: None)
    assert sorted(path.name for path in work.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (exported.method, exported.rank) == (id_of((METHOD_CONFIGS | OTHERS)[method]), None)
    assert exported.size_bytes == sum(path.stat().st_size for path in work.iterdir())
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (work, adapter))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)
    model = AutoModelForCausalLM.from_pretrained(entry.weights, dtype=torch.float32)
    with torch.no_grad():
        logits = PeftModel.from_pretrained(model, work)(IDS).logits
    torch.testing.assert_close(
        logits[:, -IDS.shape[1] :], adapted_logits(entry, adapter)[:, -IDS.shape[1] :], rtol=1e-4, atol=1e-4
    )


# --- what does not merge ---


def test_a_method_merges_where_all_its_updates_do(tmp_path: Path) -> None:
    loaded = load(entry_of(write_tiny_model(tmp_path / "base", biased=True)))
    seen = set()
    for name, config in (METHOD_CONFIGS | OTHERS).items():
        updates = attach(loaded, name, config, seed=0).updates.values()
        assert {isinstance(update, Mergeable) for update in updates} == {METHODS[id_of(config)].merges}, name
        seen.add(id_of(config))
    assert seen == METHODS.keys()


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_what_stands_before_the_samples_is_refused(tmp_path: Path, method: str) -> None:
    entry = base_of(tmp_path, "llama")
    adapter = write_adapter(tmp_path / "adapter", entry, OTHERS[method])
    with pytest.raises(BadInput, match="cannot be merged into weights"):
        merge(entry, adapter, tmp_path / "a" / "b")


def test_biases_that_the_base_does_not_have_are_refused(tmp_path: Path) -> None:
    """PEFT adds them to any linear; a model's config has no place for such."""
    from peft import BeftConfig, get_peft_model

    entry = base_of(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(entry.weights, dtype=torch.float32)
    adapted = get_peft_model(model, BeftConfig(target_modules=["up_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(BadInput, match=r"adds a bias to model\.layers\.0\.mlp\.up_proj, which has none in this base"):
        merge(entry, tmp_path / "adapter", tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
