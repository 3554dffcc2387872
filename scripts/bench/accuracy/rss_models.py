"""Models of some 20 to 150 million random weights and data of chosen lengths, written where they are measured."""

import json
import random
import struct
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests"))

from tiny import write_tokenizer

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
HEAD_DIM = 64
PROMPT = "Go on"
AROUND = 68
"""Tokens of a sample beside its answer, in the byte-level tokenizer and its template."""


def write_model(folder, family, *, hidden, inner, layers, kv_heads, vocab, seed=0):
    """A model folder as one downloads it, its weights in bfloat16."""
    config = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": kv_heads,
        "head_dim": HEAD_DIM,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 258,
        "pad_token_id": 259,
        "torch_dtype": "bfloat16",
    }
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 258}))
    chance = np.random.default_rng(seed)
    # The same million of weights again and again: only their number matters here.
    block = _bfloat16(chance.standard_normal(1 << 20, dtype=np.float32) * 0.02)
    tensors = {
        name: _bfloat16(np.ones(shape, np.float32)) if "norm" in name else np.resize(block, shape)
        for name, shape in _shapes(family, hidden, inner, layers, kv_heads, vocab)
    }
    _write_safetensors(folder / "model.safetensors", tensors)
    return folder


def write_data(path, lengths, seed=0):
    """One sample a length, in tokens of the byte-level tokenizer."""
    chance = random.Random(seed)
    lines = [
        json.dumps({"prompt": PROMPT, "completion": "".join(chance.choices("abcdefgh", k=max(1, length - AROUND)))})
        for length in lengths
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _shapes(family, hidden, inner, layers, kv_heads, vocab):
    key = kv_heads * HEAD_DIM
    yield "model.embed_tokens.weight", (vocab, hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", key, hidden),
            ("self_attn.v_proj", key, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            yield f"{prefix}{name}.weight", (rows, columns)
            if family == "qwen2" and name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                yield f"{prefix}{name}.bias", (rows,)
        if family == "qwen3":
            yield f"{prefix}self_attn.q_norm.weight", (HEAD_DIM,)
            yield f"{prefix}self_attn.k_norm.weight", (HEAD_DIM,)
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)


def _write_safetensors(path, tensors):
    """The format by hand, since numpy has no bfloat16: a length, a JSON header, then all bytes."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, values in tensors.items():
        begin, end = end, end + values.nbytes
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for values in tensors.values():
            file.write(values.tobytes())


def _bfloat16(values):
    """The upper halves of float32 numbers."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)
