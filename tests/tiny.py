"""Tiny real models for tests: a Llama of two layers, a byte-level tokenizer and a ChatML template; no torch needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A Llama config of about 100,000 parameters; dimensions suit bitsandbytes' block of 64."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 260,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "bos_token_id": 256,
        "eos_token_id": 258,
        "pad_token_id": 259,
        "torch_dtype": "float32",
    } | changes


def tiny_weights(config: dict[str, Any], seed: int = 0, *, biased: bool = False) -> dict[str, np.ndarray]:
    """Random float32 weights under the names that transformers uses for Llama; attention has biases if `biased`."""
    random, biases = np.random.default_rng(seed), np.random.default_rng(seed + 1000)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (random.standard_normal((rows, columns)) * 0.08).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": (random.standard_normal((config["vocab_size"], hidden)) * 0.3).astype(np.float32),
        "model.norm.weight": np.ones(hidden, np.float32),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.q_proj", query, hidden),
            ("self_attn.k_proj", key, hidden),
            ("self_attn.v_proj", key, hidden),
            ("self_attn.o_proj", hidden, query),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            weights[f"{prefix}{name}.weight"] = matrix(rows, columns)
            if biased and name.startswith("self_attn"):
                weights[f"{prefix}{name}.bias"] = (biases.standard_normal(rows) * 0.3).astype(np.float32)
        weights[f"{prefix}input_layernorm.weight"] = np.ones(hidden, np.float32)
        weights[f"{prefix}post_attention_layernorm.weight"] = np.ones(hidden, np.float32)
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    return weights


def write_tokenizer(folder: Path, *, template: str | None = CHATML) -> None:
    """A byte-level tokenizer of 256 bytes and four special tokens, as tokenizer.json and tokenizer_config.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[3],
        "model_max_length": 512,
    }
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_split_tokenizer(folder: Path) -> None:
    """Byte-level BPE with one merge, digits apart: what llama.cpp calls smollm."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:255]
    vocab = {text: index for index, text in enumerate([*alphabet, "ĠĠ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "Ġ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[3],
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_tiny_model(
    folder: Path, *, seed: int = 0, template: str | None = CHATML, biased: bool = False, **changes: Any
) -> Path:
    """A complete model folder, as one downloads it; `changes` go into the config, `biased` gives attention biases."""
    from safetensors.numpy import save_file

    config = tiny_config(**({"attention_bias": True} if biased else {}), **changes)
    write_tokenizer(folder, template=template)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": config["eos_token_id"]}))
    save_file(tiny_weights(config, seed, biased=biased), str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


def write_alpaca(path: Path, count: int = 24) -> Path:
    """Records of unequal length in the alpaca form, as JSON lines."""
    lines = [
        json.dumps({"instruction": f"Repeat the number {n}.", "input": "", "output": " ".join([str(n)] * (1 + n % 7))})
        for n in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path
