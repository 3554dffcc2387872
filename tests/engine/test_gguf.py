"""GGUF files become the same weights, config and tokenizer that transformers makes of them, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from edgepeft.engine.model.gguf import convert_gguf
from edgepeft.engine.model.safetensors_stream import SafetensorsStream
from edgepeft.errors import BadInput, DiskProblem
from edgepeft.models import store
from edgepeft.models.config import read_shape
from edgepeft.models.embedded import EMBEDDED, embedded_gguf
from edgepeft.models.gguf_header import CONVERTIBLE
from edgepeft.models.source_folder import template_text
from edgepeft.models.store import add_model, ensure_model, verify_unchanged
from edgepeft.paths import home
from tiny import tiny_config, tiny_weights

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
RENAMED = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def _byte_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _ignore(phase: str, fraction: float | None) -> None:
    """Progress that nobody watches."""


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The row order of llama.cpp's rotary embedding: pairs side by side instead of half a head apart."""
    rows = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, rows, -1).swapaxes(1, 2).reshape(weight.shape)


def _writer(path: Path, architecture: str, config: dict[str, Any], *, pre: str = "smollm") -> GGUFWriter:
    writer = GGUFWriter(str(path), architecture)
    writer.add_name("tiny")
    writer.add_license("mit")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    # One letter makes room for the only merge: two blanks, which must not be torn apart by a digit behind them.
    tokens = [*_byte_alphabet()[:255], "ĠĠ", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * 4)
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(258)
    writer.add_pad_token_id(259)
    writer.add_chat_template(TEMPLATE)
    return writer


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_llama_gguf(path: Path, **changes: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A tiny Llama as GGUF, as llama.cpp's own converter would write it; its config and its original weights."""
    config = tiny_config(**changes)
    weights = tiny_weights(config)
    writer = _writer(path, "llama", config)
    for name, weight in weights.items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, number, inner = stem.split(".", 3)
            stored = f"blk.{number}.{RENAMED[inner]}.weight"
        else:
            stored = f"{RENAMED[stem]}.weight"
        if stem.endswith("q_proj"):
            weight = _interleaved(weight, config["num_attention_heads"])
        elif stem.endswith("k_proj"):
            weight = _interleaved(weight, config["num_key_value_heads"])
        writer.add_tensor(stored, np.ascontiguousarray(weight))
    _finish(writer)
    return config, weights


def _quantized(writer: GGUFWriter, name: str, weight: np.ndarray) -> None:
    kind = GGMLQuantizationType.Q8_0
    writer.add_tensor(name, quants.quantize(weight.astype(np.float32), kind), raw_dtype=kind)


def _layer_tensors(random: np.random.Generator, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    shapes = {
        "attn_q": (query, hidden),
        "attn_k": (key, hidden),
        "attn_v": (key, hidden),
        "attn_output": (hidden, query),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    for name, shape in shapes.items():
        yield name, random.standard_normal(shape)


def write_gemma2_gguf(path: Path) -> None:
    """A tiny Gemma 2 in 8 bit: four norms whose gains are stored with one added."""
    config, random = tiny_config(), np.random.default_rng(1)
    writer = _writer(path, "gemma2", config)
    writer.add_sliding_window(64)
    _quantized(writer, "token_embd.weight", random.standard_normal((260, 64)))
    writer.add_tensor("output_norm.weight", random.standard_normal(64).astype(np.float32))
    for layer in range(2):
        for name, weight in _layer_tensors(random, config):
            _quantized(writer, f"blk.{layer}.{name}.weight", weight)
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", random.standard_normal(64).astype(np.float32))
    _finish(writer)


def write_qwen3moe_gguf(path: Path) -> None:
    """A tiny Qwen 3 with four experts: gate and up come as two tensors and become one."""
    config, random = tiny_config(), np.random.default_rng(2)
    writer = _writer(path, "qwen3moe", config)
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(32)
    _quantized(writer, "token_embd.weight", random.standard_normal((260, 64)))
    _quantized(writer, "output.weight", random.standard_normal((260, 64)))
    writer.add_tensor("output_norm.weight", random.standard_normal(64).astype(np.float32))
    for layer in range(2):
        for name, weight in _layer_tensors(random, config):
            if name.startswith("attn"):
                _quantized(writer, f"blk.{layer}.{name}.weight", weight)
        for name, shape in (("gate", (4, 32, 64)), ("down", (4, 64, 32)), ("up", (4, 32, 64))):
            _quantized(writer, f"blk.{layer}.ffn_{name}_exps.weight", random.standard_normal(shape))
        writer.add_tensor(f"blk.{layer}.ffn_gate_inp.weight", random.standard_normal((4, 64)).astype(np.float32))
        for name, width in (("attn_norm", 64), ("ffn_norm", 64), ("attn_q_norm", 16), ("attn_k_norm", 16)):
            writer.add_tensor(f"blk.{layer}.{name}.weight", random.standard_normal(width).astype(np.float32))
    _finish(writer)


def _convert(source: Path, folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir()
    convert_gguf(source, folder, _ignore)
    return load_file(str(folder / "model.safetensors"))


def _assert_as_transformers(source: Path, folder: Path, converted: dict[str, torch.Tensor]) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=source.name, dtype=torch.bfloat16)
    expected = model.state_dict()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(expected) - tied == set(converted)
    for name, tensor in converted.items():
        assert torch.equal(tensor, expected[name]), name
    shape = read_shape(json.loads((folder / "config.json").read_text()))
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


def _assert_same_logits(source: Path, folder: Path, *, score_scale: float | None = None) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=source.name, dtype=torch.bfloat16)
    for module in model.modules() if score_scale is not None else ():
        # transformers takes its default for Gemma, whatever the heads' width in the file.
        if hasattr(module, "scaling"):
            module.scaling = score_scale
    loaded = AutoModelForCausalLM.from_pretrained(str(folder))
    assert loaded.dtype == torch.bfloat16
    tokens = torch.tensor([[5, 77, 200, 31]])
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_comes_back_as_it_was(tmp_path: Path, tied: bool) -> None:
    source = tmp_path / "tiny.gguf"
    config, weights = write_llama_gguf(source, tie_word_embeddings=tied)
    converted = _convert(source, tmp_path / "out")
    assert set(converted) == set(weights)
    for name, weight in weights.items():
        assert torch.equal(converted[name], torch.from_numpy(weight).to(torch.bfloat16)), name
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    for key in ("hidden_size", "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings"):
        assert written[key] == config[key]
    assert written["dtype"] == "bfloat16"
    assert "quantization_config" not in written
    _assert_as_transformers(source, tmp_path / "out", converted)
    _assert_same_logits(source, tmp_path / "out")


def test_gemmas_norms_and_qwens_experts_are_as_transformers_reads_them(tmp_path: Path) -> None:
    for name, write in (("gemma", write_gemma2_gguf), ("qwen", write_qwen3moe_gguf)):
        source = tmp_path / f"{name}.gguf"
        write(source)
        if name == "qwen":
            # transformers ignores the experts' width that the file names; the config that we write has it.
            converted = _convert(source, tmp_path / name)
            written = json.loads((tmp_path / name / "config.json").read_text())
            assert written["moe_intermediate_size"] == 32
            assert converted["model.layers.1.mlp.experts.gate_up_proj"].shape == (4, 64, 64)
            _assert_experts(source, converted)
            continue
        _assert_as_transformers(source, tmp_path / name, _convert(source, tmp_path / name))
        _assert_same_logits(source, tmp_path / name, score_scale=16**-0.5)


def _assert_experts(source: Path, converted: dict[str, torch.Tensor]) -> None:
    from gguf import GGUFReader

    raw = {
        tensor.name: quants.dequantize(tensor.data, tensor.tensor_type) for tensor in GGUFReader(str(source)).tensors
    }
    for layer in range(2):
        joined = np.concatenate([raw[f"blk.{layer}.ffn_{half}_exps.weight"] for half in ("gate", "up")], axis=1)
        experts = f"model.layers.{layer}.mlp.experts"
        assert torch.equal(converted[f"{experts}.gate_up_proj"], torch.from_numpy(joined).to(torch.bfloat16))
        down = torch.from_numpy(raw[f"blk.{layer}.ffn_down_exps.weight"]).to(torch.bfloat16)
        assert torch.equal(converted[f"{experts}.down_proj"], down)


def test_the_tokenizer_and_its_special_tokens(tmp_path: Path) -> None:
    source = tmp_path / "tiny.gguf"
    write_llama_gguf(source)
    _convert(source, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|pad|>", "<|endoftext|>")
    assert tokenizer.chat_template == TEMPLATE == template_text(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 258
    light = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    text = "<|im_start|>a  12<|im_end|>"
    assert light.encode(text).ids == tokenizer(text)["input_ids"]
    # Both blanks stay together before a digit, as the vocabulary was learned.
    pieces = light.pre_tokenizer.pre_tokenize_str("a  12")
    assert [piece for piece, _ in pieces] == ["a", "ĠĠ", "1", "2"]


def test_llama_3_rotary_scaling_is_carried_over(tmp_path: Path) -> None:
    source = tmp_path / "tiny.gguf"
    config = tiny_config(rope_theta=500000.0)
    weights = tiny_weights(config)
    writer = _writer(source, "llama", config)
    wavelengths = 2 * np.pi * 500000.0 ** (np.arange(8) / 8)
    divisors = [
        1.0 if length < 2048 else 32.0 if length > 8192 else 1 / ((1 - smooth) / 32.0 + smooth)
        for length in wavelengths
        for smooth in [(8192 / length - 1) / 3]
    ]
    writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))
    for name, weight in weights.items():
        stem = name.removesuffix(".weight")
        inner = stem.split(".", 3)[-1] if ".layers." in stem else stem
        prefix = f"blk.{stem.split('.')[2]}." if ".layers." in stem else ""
        writer.add_tensor(f"{prefix}{RENAMED[inner]}.weight", weight)
    _finish(writer)
    _convert(source, tmp_path / "out")
    rope = json.loads((tmp_path / "out" / "config.json").read_text())["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("llama3", 32.0, 500000.0)
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    plain = 500000.0 ** -(torch.arange(8) / 8)
    torch.testing.assert_close(plain / model.model.rotary_emb.inv_freq, torch.tensor(divisors, dtype=torch.float32))


def test_missing_and_foreign_tensors_are_refused(tmp_path: Path) -> None:
    for name, tensors in (("missing", {}), ("foreign", {"blk.0.attn_sinks.weight": np.ones(4, np.float32)})):
        source = tmp_path / f"{name}.gguf"
        config = tiny_config()
        writer = _writer(source, "llama", config)
        weights = tiny_weights(config)
        if name == "missing":
            weights.pop("model.layers.1.mlp.down_proj.weight")
        for key, weight in weights.items():
            stem = key.removesuffix(".weight")
            inner = stem.split(".", 3)[-1] if ".layers." in stem else stem
            prefix = f"blk.{stem.split('.')[2]}." if ".layers." in stem else ""
            writer.add_tensor(f"{prefix}{RENAMED[inner]}.weight", weight)
        for key, weight in tensors.items():
            writer.add_tensor(key, weight)
        _finish(writer)
        (tmp_path / name).mkdir()
        with pytest.raises(BadInput, match=r"layers\.1\.mlp\.down_proj|blk\.0\.attn_sinks"):
            convert_gguf(source, tmp_path / name, _ignore)


def test_what_is_called_convertible_is_what_transformers_reads() -> None:
    renamed = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}
    assert {renamed.get(name, name) for name in CONVERTIBLE} <= set(GGUF_SUPPORTED_ARCHITECTURES)


def test_a_stream_refuses_what_was_not_announced(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with SafetensorsStream(path, {"a": (2, 3), "b": (1,)}, torch.bfloat16) as stream:
        stream.write("b", torch.tensor([2.0]))
        with pytest.raises(ValueError, match="announced was"):
            stream.write("a", torch.ones(3, 2))
        stream.write("a", torch.arange(6.0).reshape(3, 2).T)
        with pytest.raises(ValueError, match="announced was"):
            stream.write("c", torch.ones(1))
    read = load_file(str(path))
    assert read["a"].tolist() == [[0, 2, 4], [1, 3, 5]]
    assert read["b"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="never written"), SafetensorsStream(path, {"a": (1,)}, torch.bfloat16):
        pass


def test_the_store_converts_a_gguf_once_in_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "Tiny Q8.gguf"
    write_llama_gguf(source)
    phases: list[str] = []
    entry = add_model(source, progress=lambda phase, _: phases.append(phase))
    assert (entry.name, entry.kind, entry.licence, entry.stored_as) == ("tiny-q8", "gguf", "mit", "bf16")
    assert list(dict.fromkeys(phases)) == ["fingerprint", "reading", "converting", "tokenizer"]
    assert (Path(entry.folder) / "chat_template.jinja").read_text() == TEMPLATE
    verify_unchanged(entry)
    monkeypatch.setattr(store, "convert", None)
    assert ensure_model(str(source)) == entry


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "tiny.gguf"
    write_llama_gguf(source)
    source.write_bytes(source.read_bytes()[:-4096])
    with pytest.raises(BadInput, match="not a complete GGUF"):
        add_model(source)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1})())
    with pytest.raises(DiskProblem, match="are free"):
        add_model(source)
    assert [path.name for path in home().models.iterdir() if path.suffix != ".lock"] == []


@pytest.mark.slow
def test_the_embedded_model_is_what_transformers_makes_of_it() -> None:
    source = embedded_gguf()
    entry = ensure_model(EMBEDDED)
    folder = Path(entry.folder)
    assert (entry.kind, entry.licence, entry.shape.parameters) == ("embedded", "apache-2.0", 134_515_008)
    converted = load_file(str(folder / "model.safetensors"))
    _assert_as_transformers(source, folder, converted)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    assert tokenizer.eos_token == "<|im_end|>"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
