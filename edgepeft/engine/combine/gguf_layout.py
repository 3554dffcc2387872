"""How llama.cpp lays out the architectures that are written here: names, row orders, offsets and hyperparameters.

The facts are those of llama.cpp's converters. What its code for an architecture cannot compute is refused: a file that
loads and answers otherwise would be worse than none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, RopeScalingType, get_tensor_name_map
from torch import Tensor

from edgepeft.errors import BadInput

Pair = tuple[str, Any]
"""Method of `gguf.GGUFWriter` without its `add_`, and its argument."""

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The only values of Llama 3's scaling that published models have; a GGUF keeps its divisors, not the numbers."""

_YARN = {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "mscale": None, "mscale_all_dim": None}
"""What llama.cpp's YaRN (arXiv 2309.00071) computes with where a file says nothing."""


class GgufLayout(NamedTuple):
    """One architecture as a GGUF file holds it."""

    name: str
    """`general.architecture`."""
    interleaved: bool = False
    """Whether the rotary pairs of queries and keys lie side by side, instead of half a head apart."""
    norm_offset: float = 0.0
    """Added to the gains of norms."""


LAYOUTS = {
    "llama": GgufLayout("llama", interleaved=True),
    "mistral": GgufLayout("llama", interleaved=True),
    "qwen2": GgufLayout("qwen2"),
    "qwen3": GgufLayout("qwen3"),
    "gemma2": GgufLayout("gemma2", norm_offset=1.0),
    "gemma3_text": GgufLayout("gemma3", norm_offset=1.0),
}
"""transformers' `model_type` → its layout."""


class TensorNames:
    """Names of the base's tensors in a GGUF file.

    Args:
        config: transformers' config of the base.

    Raises:
        BadInput: the architecture is not known here.
    """

    def __init__(self, config: Any) -> None:
        self.layout = layout_of(config)
        self._heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        self._tied = bool(config.tie_word_embeddings)
        arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == self.layout.name)
        self._map = get_tensor_name_map(MODEL_ARCH(arch), config.num_hidden_layers)

    def find(self, name: str) -> str | None:
        """The tensor's name in the file; None for one that such a file does not have.

        Raises:
            BadInput: the architecture has no place for it.
        """
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and self._tied):
            return None
        found: str | None = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise BadInput(f"tensor {name} has no place in a GGUF file of the architecture {self.layout.name}")
        return found

    def reorder_rows(self, module: str, rows: Tensor) -> Tensor:
        """Rows [out, …] of a linear's weight, bias or LoRA B in the file's order.

        Args:
            module: path of the linear, or of its tensor.
            rows: first dimension is the linear's output.
        """
        heads = self.heads_to_interleave(module)
        if heads is None:
            return rows
        return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).transpose(1, 2).reshape(rows.shape)

    def restore_rows(self, module: str, rows: Tensor) -> Tensor:
        """Rows [out, …] in transformers' order: the inverse of `reorder_rows`."""
        heads = self.heads_to_interleave(module)
        if heads is None:
            return rows
        return rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(rows.shape)

    def heads_to_interleave(self, module: str) -> int | None:
        """How many heads the rows of a linear are; None where they keep their order."""
        if not self.layout.interleaved:
            return None
        return next((heads for name, heads in self._heads.items() if name in module.split(".")), None)


def layout_of(config: Any) -> GgufLayout:
    """The layout for a base's config.

    Raises:
        BadInput: none is known.
    """
    layout = LAYOUTS.get(config.model_type)
    if layout is None:
        raise BadInput(
            f"GGUF files of model_type {config.model_type!r} cannot be written here",
            where="--format",
            hint=f"Known: {', '.join(LAYOUTS)}; llama.cpp's own converters read what safetensors and peft give",
        )
    return layout


def check_representable(config: Any) -> list[str]:
    """Refuses a model that llama.cpp's code for the architecture would compute otherwise; returns notes.

    Raises:
        BadInput: saying which setting is in the way.
    """
    layout = layout_of(config)
    gemma = layout.name.startswith("gemma")
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation not in (("gelu_pytorch_tanh",) if gemma else ("silu",)):
        raise _not_representable(f"the activation {activation}")
    for key in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if getattr(config, key, False):
            raise _not_representable(key)
    for rope in _ropes(config):
        kind = rope.get("rope_type", "default")
        if kind not in ("default", "linear", "yarn", "llama3") or (kind == "llama3" and layout.name != "llama"):
            raise _not_representable(f"rotary scaling of the type {kind}")
        if kind == "llama3" and any(rope.get(key) != value for key, value in _LLAMA3.items()):
            raise _not_representable("a variant of Llama 3's rotary scaling")
        if kind == "yarn" and any(rope.get(key) not in (None, value) for key, value in _YARN.items()):
            raise _not_representable("a variant of YaRN's rotary scaling")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise _not_representable("partial rotary embeddings")
    window = getattr(config, "sliding_window", None)
    if gemma:
        _check_gemma(config, layout)
    elif layout.name.startswith("qwen") and window is not None:
        raise _not_representable("sliding-window attention")
    elif window is not None and window < config.max_position_embeddings:
        return [f"llama.cpp has no attention window for this architecture: beyond {window:,} tokens it differs"]
    return []


def hyperparameters(config: Any) -> list[Pair]:
    """What a file says of the model's dimensions, for a config that is representable."""
    layout = layout_of(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs: list[Pair] = [
        ("block_count", config.num_hidden_layers),
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size),
        ("head_count", config.num_attention_heads),
        ("head_count_kv", config.num_key_value_heads),
        ("layer_norm_rms_eps", config.rms_norm_eps),
        ("key_length", head_dim),
        ("value_length", head_dim),
        ("vocab_size", config.vocab_size),
    ]
    if layout.name == "llama":
        pairs.append(("rope_dimension_count", head_dim))
    if layout.name.startswith("gemma"):
        pairs.append(("sliding_window", config.sliding_window))
        if config.attn_logit_softcapping:
            pairs.append(("attn_logit_softcapping", config.attn_logit_softcapping))
        if config.final_logit_softcapping:
            pairs.append(("final_logit_softcapping", config.final_logit_softcapping))
    return pairs + list(_rope_pairs(config))


def rope_divisors(config: Any) -> np.ndarray | None:
    """The tensor `rope_freqs.weight`, float32 [head_dim / 2], of Llama 3's scaling; None where there is none."""
    rope = _ropes(config)[0]
    if rope.get("rope_type") != "llama3":
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    # Short waves stay, long ones are stretched, and between them it changes evenly (Llama 3, arXiv 2407.21783).
    share = ((rope["original_max_position_embeddings"] / wavelengths - low) / (high - low)).clamp(0, 1)
    divisors: np.ndarray = (1 / ((1 - share) / rope["factor"] + share)).to(torch.float32).numpy()
    return divisors


def _rope_pairs(config: Any) -> Iterator[Pair]:
    full, *local = _ropes(config)
    yield "rope_freq_base", full["rope_theta"]
    if local:
        yield "rope_freq_base_swa", local[0]["rope_theta"]
    if full.get("rope_type") in ("linear", "yarn"):
        yield "rope_scaling_type", RopeScalingType(full["rope_type"])
        yield "rope_scaling_factor", full["factor"]
    if full.get("rope_type") == "yarn":
        yield "rope_scaling_orig_ctx_len", full["original_max_position_embeddings"]


def _ropes(config: Any) -> list[dict[str, Any]]:
    """Rotary parameters of the layers that see everything, then of those with a window where they have their own."""
    parameters: dict[str, Any] = dict(config.rope_parameters or {})
    if isinstance(parameters.get("full_attention"), dict):
        return [parameters["full_attention"], parameters["sliding_attention"]]
    return [parameters]


def _check_gemma(config: Any, layout: GgufLayout) -> None:
    period = 6 if layout.name == "gemma3" else 2
    expected = ["sliding_attention" if (n + 1) % period else "full_attention" for n in range(config.num_hidden_layers)]
    if config.layer_types != expected:
        raise _not_representable("another order of local and global layers")
    # llama.cpp knows the 27B models, whose scores are scaled by hidden / heads, by their number of layers.
    largest = config.num_hidden_layers == (62 if layout.name == "gemma3" else 46)
    scalar = config.hidden_size / config.num_attention_heads if largest else config.head_dim
    if layout.name == "gemma2" and not config.tie_word_embeddings:
        raise _not_representable("an output head of its own")
    if config.query_pre_attn_scalar != scalar:
        raise _not_representable(f"query_pre_attn_scalar {config.query_pre_attn_scalar}")
    if layout.name == "gemma3" and _ropes(config)[1] != {"rope_type": "default", "rope_theta": 10000.0}:
        raise _not_representable("another rotary base of the local layers")


def _not_representable(what: str) -> BadInput:
    return BadInput(
        f"the base has {what}, which llama.cpp's code for its architecture does not compute",
        where="--format",
        hint="Write safetensors instead",
    )
