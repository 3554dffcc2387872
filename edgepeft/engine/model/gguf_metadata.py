"""What a GGUF file says beside its weights: rotary scaling, tokenizer, special tokens and chat template."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from transformers import AutoTokenizer, PretrainedConfig

from edgepeft.errors import BadInput

# Vocabularies whose merges were learned with every digit apart; transformers splits them as GPT-2 does.
_DIGIT_SPLITTERS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
_LLAMA3_ORIGINAL_CONTEXT = 8192
_SOFT_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def gguf_value(reader: GGUFReader, key: str) -> Any:
    """The value under `key`; None when the file has none."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def rope_parameters(reader: GGUFReader, architecture: str, config: PretrainedConfig) -> dict[str, Any] | None:
    """Rotary scaling as transformers writes it; None when the file scales nothing.

    GGUF keeps Llama 3's scaling as a tensor of per-frequency divisors, Phi's as two such tensors, and the others' as
    metadata. transformers reads none of them, and a model without them degrades on long inputs.
    """
    base: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "rope_freqs.weight" in tensors:
        divisors = np.asarray(tensors["rope_freqs.weight"].data, np.float64)
        return base | _llama3_scaling(divisors, float(base.get("rope_theta", 10000.0)))
    original = gguf_value(reader, f"{architecture}.rope.scaling.original_context_length")
    if "rope_factors_long.weight" in tensors and "rope_factors_short.weight" in tensors:
        config.original_max_position_embeddings = int(original or 4096)
        return base | {
            "rope_type": "longrope",
            "long_factor": tensors["rope_factors_long.weight"].data.astype(float).tolist(),
            "short_factor": tensors["rope_factors_short.weight"].data.astype(float).tolist(),
            "original_max_position_embeddings": int(original or 4096),
        }
    kind = gguf_value(reader, f"{architecture}.rope.scaling.type")
    factor = gguf_value(reader, f"{architecture}.rope.scaling.factor")
    if kind not in ("linear", "yarn") or not factor:
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": float(factor)}
    if kind == "yarn" and original:
        scaling["original_max_position_embeddings"] = int(original)
    if isinstance(base.get("full_attention"), dict):
        # Gemma 3 scales its global layers only.
        return base | {"full_attention": base["full_attention"] | scaling}
    return base | scaling


def attention_settings(reader: GGUFReader, architecture: str, config: PretrainedConfig) -> dict[str, Any]:
    """What transformers leaves at its defaults: the width of a head, and Gemma's soft caps and scale of scores."""
    found: dict[str, Any] = {}
    head_dim = gguf_value(reader, f"{architecture}.attention.key_length")
    if head_dim and hasattr(config, "head_dim"):
        found["head_dim"] = int(head_dim)
    if architecture in ("gemma2", "gemma3") and head_dim:
        for name in _SOFT_CAPS:
            if (cap := gguf_value(reader, f"{architecture}.{name}")) is not None:
                found[name] = float(cap)
        # No file says the scale; llama.cpp tells the 27B models, which have another, by their number of layers.
        largest = config.num_hidden_layers == (62 if architecture == "gemma3" else 46)
        found["query_pre_attn_scalar"] = config.hidden_size // config.num_attention_heads if largest else int(head_dim)
    return found


def _llama3_scaling(divisors: np.ndarray, theta: float) -> dict[str, Any]:
    """The four numbers of Llama 3's scaling, found from the divisors it leads to.

    Raises:
        BadInput: the divisors come from another kind of scaling.
    """
    factor = float(divisors.max())
    frequencies = theta ** -(np.arange(len(divisors)) / len(divisors))
    wavelengths = 2 * math.pi / frequencies
    smooth = np.clip((_LLAMA3_ORIGINAL_CONTEXT / wavelengths - 1.0) / 3.0, 0.0, 1.0)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(divisors, expected, rtol=1e-3):
        raise BadInput(
            "the rotary scaling in this file is of a kind that cannot be carried over",
            where="rope_freqs.weight",
            hint="Bring the model's original safetensors folder instead: edgepeft models add DIR",
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL_CONTEXT,
    }


def write_gguf_tokenizer(source: Path, folder: Path, reader: GGUFReader, *, context_length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and, where the file has one, chat_template.jinja.

    Raises:
        BadInput: the file has no tokenizer, or one of a kind that cannot be converted.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
        raise BadInput(
            "the tokenizer in this file cannot be converted",
            where=str(source),
            hint="Bring the model's original safetensors folder instead: edgepeft models add DIR",
        ) from error
    if gguf_value(reader, "tokenizer.ggml.pre") in _DIGIT_SPLITTERS:
        _split_digits(tokenizer)
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "backend"):
        settings.pop(key, None)
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context_length}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _split_digits(tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def write_generation_config(folder: Path, reader: GGUFReader) -> None:
    """Writes generation_config.json with the tokens that begin, end and pad."""
    ends = [gguf_value(reader, f"tokenizer.ggml.{name}") for name in ("eos_token_id", "eot_token_id", "eom_token_id")]
    distinct = list(dict.fromkeys(int(token) for token in ends if token is not None))
    values: dict[str, Any] = {
        "bos_token_id": gguf_value(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": distinct[0] if len(distinct) == 1 else distinct or None,
        "pad_token_id": gguf_value(reader, "tokenizer.ggml.padding_token_id"),
    }
    kept = {key: value for key, value in values.items() if value is not None}
    (folder / "generation_config.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
