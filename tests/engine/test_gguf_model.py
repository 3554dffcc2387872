"""Merged models and adapters as GGUF files: our own loader and the package's reader find in them what was merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, quants
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from edgepeft.engine.combine import gguf_model, jobs
from edgepeft.engine.combine.gguf_layout import LAYOUTS, TensorNames, check_representable, rope_divisors
from edgepeft.engine.model.gguf import convert_gguf
from edgepeft.engine.model.gguf_metadata import gguf_value
from edgepeft.engine.simulate.model import read_config
from edgepeft.errors import BadInput
from edgepeft.library.merging import ExportRequest
from edgepeft.methods import LoraConfig
from edgepeft.models.gguf_header import CONVERTIBLE
from edgepeft.models.source_folder import read_json, template_text
from edgepeft.models.store import ModelEntry, ensure_model
from merging import (
    LLAMA3,
    YARN,
    adapted_logits,
    config_of,
    entry_of,
    folder_logits,
    merge,
    write_adapter,
    write_base,
)

KINDS = ["llama", "llama3", "mistral", "qwen2", "qwen2-yarn", "qwen3", "gemma2", "gemma3"]


def base_of(tmp_path: Path, kind: str, **changes: Any) -> ModelEntry:
    return entry_of(write_base(tmp_path / "base", kind, **changes))


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: quants.dequantize(tensor.data, tensor.tensor_type) for tensor in GGUFReader(path).tensors}


def unpaired(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows in transformers' order again: what the rotary code of llama.cpp pairs lies half a head apart there."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize(
    ("kind", "tied"), [(kind, tied) for kind in KINDS for tied in (True, False) if (kind, tied) != ("gemma2", False)]
)
def test_our_loader_reads_the_merged_model_back(tmp_path: Path, kind: str, tied: bool) -> None:
    entry = base_of(tmp_path, kind, tie_word_embeddings=tied)
    adapter = write_adapter(tmp_path / "adapter", entry)
    merged = merge(entry, adapter, tmp_path / "a" / "b", format="gguf-f16")
    file = (tmp_path / "a" / "b" / "model.gguf").rename(tmp_path / "merged.gguf")
    # 16-bit floats, then bf16, are all that lies between.
    assert 0 < merged.drift.mean_kl < 1e-3
    read = tmp_path / "read"
    read.mkdir()
    convert_gguf(file, read, lambda *_: None)
    merge(entry, adapter, tmp_path / "c" / "d", dtype="fp16")
    expected = load_file(tmp_path / "c" / "d" / "model.safetensors")
    found = load_file(read / "model.safetensors")
    assert set(expected) - {"lm_head.weight"} == set(found) - {"lm_head.weight"}
    base = load_file(Path(entry.weights) / "model.safetensors")
    for name, tensor in found.items():
        if tensor.dim() > 1:
            assert torch.equal(tensor, expected[name].float().bfloat16()), name
        else:
            # Kept in float32; Gemma's gains come back from having 1 added.
            torch.testing.assert_close(tensor, base[name].bfloat16(), rtol=2**-7, atol=1e-6)
    as_bf16 = folder_logits(tmp_path / "c" / "d", torch.bfloat16).float()
    torch.testing.assert_close(folder_logits(read).float(), as_bf16, rtol=0.05, atol=0.1)
    exact = adapted_logits(entry, adapter)
    torch.testing.assert_close(folder_logits(read, torch.float32), exact, rtol=0.05, atol=0.1)
    for key in ("num_key_value_heads", "hidden_size", "intermediate_size", "vocab_size", "rms_norm_eps"):
        before, after = (read_json(Path(folder) / "config.json") for folder in (entry.folder, read))
        assert after[key] == pytest.approx(before[key], rel=1e-6), key
    assert template_text(read) == template_text(Path(entry.folder))
    assert json.loads((read / "generation_config.json").read_text())["eos_token_id"] == 258
    light = Tokenizer.from_file(str(read / "tokenizer.json"))
    text = "<|im_start|>a  12 b<|im_end|>"
    assert light.encode(text).ids == Tokenizer.from_file(str(tmp_path / "base" / "tokenizer.json")).encode(text).ids


def test_rows_of_queries_and_keys_lie_in_pairs(tmp_path: Path) -> None:
    entry = base_of(tmp_path, "llama")
    adapter = write_adapter(tmp_path / "adapter", entry)
    merge(entry, adapter, tmp_path / "a" / "b", format="gguf-f16")
    merge(entry, adapter, tmp_path / "c" / "d")
    stored, expected = (
        tensors_of(tmp_path / "a" / "b" / "model.gguf"),
        load_file(tmp_path / "c" / "d" / "model.safetensors"),
    )
    for name, heads in (("q", 4), ("k", 2)):
        rows = stored[f"blk.1.attn_{name}.weight"]
        original = expected[f"model.layers.1.self_attn.{name}_proj.weight"].half().float().numpy()
        assert not np.array_equal(rows, original)
        np.testing.assert_array_equal(unpaired(rows, heads), original)
        # The first two rows of a head are its first row and the one half a head further.
        np.testing.assert_array_equal(rows[0:2], original[[0, 8]])


def test_q8_0_is_written_and_measured(tmp_path: Path) -> None:
    entry = base_of(tmp_path, "qwen2")
    adapter = write_adapter(tmp_path / "adapter", entry)
    half = merge(entry, adapter, tmp_path / "a" / "b", format="gguf-f16")
    eight = merge(entry, adapter, tmp_path / "c" / "d", format="gguf-q8_0")
    assert eight.size_bytes < 0.65 * half.size_bytes
    assert half.drift.mean_kl < eight.drift.mean_kl < 0.02
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "c" / "d" / "model.gguf").tensors}
    assert kinds["token_embd.weight"] == kinds["blk.0.ffn_down.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == kinds["blk.1.attn_k.bias"] == kinds["output_norm.weight"] == "F32"
    reader = GGUFReader(tmp_path / "c" / "d" / "model.gguf")
    assert gguf_value(reader, "general.file_type") == 7
    merge(entry, adapter, tmp_path / "e" / "f")
    exact = load_file(tmp_path / "e" / "f" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].numpy()
    stored = tensors_of(tmp_path / "c" / "d" / "model.gguf")["blk.0.ffn_down.weight"]
    # Half a step of the block's scale, and the scale's own rounding.
    assert np.abs(stored - exact).max() <= np.abs(exact).max() / 127 * 0.51


def test_rows_that_are_no_multiple_of_a_block_stay_in_16_bit(tmp_path: Path) -> None:
    entry = base_of(tmp_path, "llama", intermediate_size=136)
    merge(entry, write_adapter(tmp_path / "adapter", entry), tmp_path / "a" / "b", format="gguf-q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "a" / "b" / "model.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"


def test_the_metadata_is_what_llama_cpp_looks_for(tmp_path: Path) -> None:
    entry = base_of(tmp_path, "llama")
    adapter = write_adapter(tmp_path / "adapter", entry)
    own = "{{ messages }}<|pad|>"
    merge(entry, adapter, tmp_path / "a" / "b", format="gguf-f16", template=own, stop_ids=(259, 258))
    reader = GGUFReader(tmp_path / "a" / "b" / "model.gguf")
    expected = {
        "general.type": "model",
        "general.name": "tiny with a",
        "general.finetune": "a@v1",
        "general.file_type": 1,
        "llama.block_count": 2,
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 260,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 258,
        "tokenizer.ggml.eot_token_id": 259,
        "tokenizer.ggml.padding_token_id": 259,
        "tokenizer.chat_template": own,
    }
    assert {key: gguf_value(reader, key) for key in expected} == expected
    assert gguf_value(reader, "tokenizer.ggml.merges") == ["Ġ Ġ"]
    assert gguf_value(reader, "tokenizer.ggml.token_type") == [1] * 256 + [3] * 4
    offsets = [tensor.data_offset for tensor in reader.tensors]
    assert all(offset % 32 == 0 for offset in offsets)


def test_a_base_from_a_gguf_file_gives_its_own_metadata(tmp_path: Path) -> None:
    first = base_of(tmp_path, "llama")
    adapter = write_adapter(tmp_path / "adapter", first)
    merge(first, adapter, tmp_path / "a" / "b", format="gguf-f16")
    file = (tmp_path / "a" / "b" / "model.gguf").rename(tmp_path / "first.gguf")
    entry = ensure_model(str(file))
    second = write_adapter(tmp_path / "second", entry)
    # The tokenizer is not made from the folder's, and the template is kept where none is given.
    (Path(entry.folder) / "tokenizer.json").rename(tmp_path / "kept.json")
    model = gguf_model.GgufModel(
        entry, _weights(entry, second), "f16", title="again", adapter="b@v1", template=None, stop_ids=()
    )
    (tmp_path / "kept.json").rename(Path(entry.folder) / "tokenizer.json")
    model.write(tmp_path / "second.gguf", lambda *_: None)
    before, after = GGUFReader(file), GGUFReader(tmp_path / "second.gguf")
    replaced = {"general.name", "general.finetune"}
    for key in before.fields:
        if not key.startswith("GGUF.") and key not in replaced:
            assert gguf_value(after, key) == gguf_value(before, key), key
    assert gguf_value(after, "general.name") == "again"
    assert gguf_value(after, "general.finetune") == "b@v1"
    merged = merge(entry, second, tmp_path / "c" / "d", format="gguf-q8_0", dtype="bf16", precision="bf16")
    assert merged.drift.mean_kl < 0.02


def _weights(entry: ModelEntry, adapter: Path) -> Any:
    from edgepeft.engine.combine.base_files import BaseFiles
    from edgepeft.engine.combine.merge import MergedWeights, changes_of
    from edgepeft.engine.combine.outline import open_outline
    from edgepeft.engine.methods.files import read_adapter

    outline, files = open_outline(entry), BaseFiles(entry)
    return MergedWeights(files, changes_of(read_adapter(adapter, outline, "a"), outline, files, "a"), torch.float16)


def test_llama_3s_scaling_becomes_its_divisors() -> None:
    divisors = rope_divisors(config_of("llama3"))
    assert divisors is not None
    wavelengths = 2 * np.pi * 500000.0 ** (np.arange(8) / 8)
    expected = [
        1.0 if length < 2048 else 32.0 if length > 8192 else 1 / ((1 - smooth) / 32.0 + smooth)
        for length in wavelengths
        for smooth in [(8192 / length - 1) / 3]
    ]
    np.testing.assert_allclose(divisors, expected, rtol=1e-6)
    assert rope_divisors(config_of("llama")) is None


def test_every_architecture_that_is_written_can_be_read_back() -> None:
    assert {layout.name for layout in LAYOUTS.values()} <= CONVERTIBLE


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"hidden_act": "gelu"}, "activation gelu"),
        ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 2.0}}, "variant of Llama 3"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "type dynamic"),
        ("qwen2", {"rope_parameters": YARN | {"beta_fast": 16}}, "variant of YaRN"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64}, "sliding-window"),
        ("gemma2", {"layer_types": ["full_attention", "full_attention"]}, "local and global"),
        ("gemma2", {"head_dim": 32}, "query_pre_attn_scalar 16"),
        ("gemma2", {"tie_word_embeddings": False}, "head of its own"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        check_representable(config_of(kind, **changes))
    assert "\n" not in str(caught.value)


def test_an_unknown_architecture_is_refused_in_a_sentence(tmp_path: Path) -> None:
    import transformers

    with pytest.raises(BadInput, match=r"model_type 'phi3' cannot be written here\. Known: llama, mistral"):
        TensorNames(transformers.Phi3Config())


def test_a_window_that_llama_cpp_lacks_is_told() -> None:
    config = config_of("mistral")
    config.sliding_window = 128
    assert check_representable(config) == [
        "llama.cpp has no attention window for this architecture: beyond 128 tokens it differs"
    ]


# --- adapters ---


def export(entry: ModelEntry, adapter: Path, work: Path, format: Any) -> Any:
    work.mkdir(parents=True)
    request = ExportRequest(base=entry.name, adapter=str(adapter), title="a", work=str(work), format=format)
    return jobs.export(request, lambda *_: None)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapters_tensors_are_beside_those_of_the_model(tmp_path: Path, kind: str) -> None:
    """What llama.cpp adds to its weights is what was trained, in its own order of rows."""
    entry = base_of(tmp_path, kind)
    adapter = write_adapter(tmp_path / "adapter", entry, LoraConfig(rank=4, alpha=6.0, rank_stabilised=True))
    done = export(entry, adapter, tmp_path / "a" / "b", "gguf")
    file = tmp_path / "a" / "b" / "adapter.gguf"
    reader, stored = GGUFReader(file), tensors_of(file)
    assert gguf_value(reader, "general.type") == "adapter"
    assert gguf_value(reader, "adapter.type") == "lora"
    assert (
        gguf_value(reader, "general.architecture")
        == LAYOUTS[read_config(read_json(tmp_path / "base" / "config.json")).model_type].name
    )
    alpha = gguf_value(reader, "adapter.lora.alpha")
    assert (alpha, done.rank) == (done.alpha, 4)
    merge(entry, adapter, tmp_path / "c" / "d", format="gguf-f16")
    whole = tensors_of(tmp_path / "c" / "d" / "model.gguf")
    plain = write_adapter(tmp_path / "plain", entry, size=0.0)
    merge(entry, plain, tmp_path / "e" / "f", format="gguf-f16")
    base = tensors_of(tmp_path / "e" / "f" / "model.gguf")
    assert {name.rsplit(".", 1)[0] for name in stored} == {
        name for name in base if not np.array_equal(base[name], whole[name])
    }
    for name in {name.rsplit(".", 1)[0] for name in stored}:
        A, B = stored[f"{name}.lora_a"], stored[f"{name}.lora_b"]
        assert A.shape[0] == B.shape[1] == 4
        np.testing.assert_allclose(base[name] + alpha / 4 * (B @ A), whole[name], rtol=1e-2, atol=1e-3, err_msg=name)


def test_un_permuted_it_is_the_trained_b(tmp_path: Path) -> None:
    entry = base_of(tmp_path, "llama")
    adapter = write_adapter(tmp_path / "adapter", entry)
    export(entry, adapter, tmp_path / "a" / "b", "gguf")
    trained, stored = (
        load_file(adapter / "adapter_model.safetensors"),
        tensors_of(tmp_path / "a" / "b" / "adapter.gguf"),
    )
    for name, module, heads in (
        ("attn_q", "self_attn.q_proj", 4),
        ("attn_k", "self_attn.k_proj", 2),
        ("ffn_down", "mlp.down_proj", 0),
    ):
        A, B = (trained[f"base_model.model.model.layers.1.{module}.lora_{side}.weight"].numpy() for side in "AB")
        found = stored[f"blk.1.{name}.weight.lora_b"]
        np.testing.assert_array_equal(unpaired(found, heads) if heads else found, B)
        np.testing.assert_array_equal(stored[f"blk.1.{name}.weight.lora_a"], A)


def test_tensors(tmp_path: Path) -> None:
    rows = torch.arange(16.0)[:, None]
    names = TensorNames(config_of("llama"))
    moved: Tensor = names.reorder_rows("model.layers.0.self_attn.q_proj", rows.repeat(4, 2))
    assert moved[:4, 0].tolist() == [0, 8, 1, 9]
    assert names.reorder_rows("model.layers.0.self_attn.v_proj", rows) is rows
    assert names.find("lm_head.weight") == ("output.weight" if not config_of("llama").tie_word_embeddings else None)
    with pytest.raises(BadInput, match="has no place"):
        names.find("model.layers.0.self_attn.sinks")
