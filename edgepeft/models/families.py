"""The decoder families that edgepeft knows: how a config's numbers become the linear layers of one decoder layer.

Each family is what the class of the same name in transformers builds; a test compares the parameter counts with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from edgepeft.models.shape import LinearShape


class Dimensions(msgspec.Struct, frozen=True):
    """The numbers of one config that a family needs, after defaults."""

    hidden: int
    """Width of the residual stream."""
    intermediate: int
    """Width inside the MLP."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads."""
    head_dim: int
    """Entries of one head."""

    @property
    def query(self) -> int:
        """Rows of the query projection."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Rows of the key or the value projection."""
        return self.kv_heads * self.head_dim


class LayerParts(msgspec.Struct, frozen=True):
    """What one decoder layer holds."""

    linears: tuple[LinearShape, ...]
    """Its linear modules in forward order."""
    norm_parameters: int
    """Entries of its norms."""
    expert_parameters: int = 0
    """Entries of fused experts and their router."""


class Family(msgspec.Struct, frozen=True):
    """One `model_type` of transformers."""

    architecture: str
    """The causal language model's class."""
    build: Callable[[Dimensions, Mapping[str, Any]], LayerParts]
    """Makes the parts of one layer from the dimensions and the config with defaults."""
    defaults: Mapping[str, Any] = {}
    """Values that the config may leave out, where they differ from the common ones."""
    final_norm: int = 1
    """Entries of the final norm, as a multiple of the hidden size."""


def _attention(d: Dimensions, *, qkv_bias: bool = False, output_bias: bool = False) -> tuple[LinearShape, ...]:
    return (
        LinearShape("self_attn.q_proj", d.hidden, d.query, qkv_bias),
        LinearShape("self_attn.k_proj", d.hidden, d.key, qkv_bias),
        LinearShape("self_attn.v_proj", d.hidden, d.key, qkv_bias),
        LinearShape("self_attn.o_proj", d.query, d.hidden, output_bias),
    )


def _gated_mlp(hidden: int, intermediate: int, *, prefix: str = "mlp.", bias: bool = False) -> tuple[LinearShape, ...]:
    return (
        LinearShape(f"{prefix}gate_proj", hidden, intermediate, bias),
        LinearShape(f"{prefix}up_proj", hidden, intermediate, bias),
        LinearShape(f"{prefix}down_proj", intermediate, hidden, bias),
    )


def _llama(d: Dimensions, config: Mapping[str, Any]) -> LayerParts:
    bias = bool(config.get("attention_bias"))
    mlp = _gated_mlp(d.hidden, d.intermediate, bias=bool(config.get("mlp_bias")))
    return LayerParts(_attention(d, qkv_bias=bias, output_bias=bias) + mlp, 2 * d.hidden)


def _plain(d: Dimensions, config: Mapping[str, Any]) -> LayerParts:
    return LayerParts(_attention(d) + _gated_mlp(d.hidden, d.intermediate), 2 * d.hidden)


def _qwen2(d: Dimensions, config: Mapping[str, Any]) -> LayerParts:
    return LayerParts(_attention(d, qkv_bias=True) + _gated_mlp(d.hidden, d.intermediate), 2 * d.hidden)


def _qwen3(d: Dimensions, config: Mapping[str, Any]) -> LayerParts:
    bias = bool(config.get("attention_bias"))
    attention = _attention(d, qkv_bias=bias, output_bias=bias)
    return LayerParts(attention + _gated_mlp(d.hidden, d.intermediate), 2 * d.hidden + 2 * d.head_dim)


def _gemma(d: Dimensions, config: Mapping[str, Any]) -> LayerParts:
    bias = bool(config.get("attention_bias"))
    attention = _attention(d, qkv_bias=bias, output_bias=bias)
    return LayerParts(attention + _gated_mlp(d.hidden, d.intermediate), 2 * d.hidden)


def _gemma2(d: Dimensions, config: Mapping[str, Any]) -> LayerParts:
    parts = _gemma(d, config)
    return LayerParts(parts.linears, 4 * d.hidden)


def _gemma3(d: Dimensions, config: Mapping[str, Any]) -> LayerParts:
    parts = _gemma(d, config)
    return LayerParts(parts.linears, 4 * d.hidden + 2 * d.head_dim)


def _phi3(d: Dimensions, config: Mapping[str, Any]) -> LayerParts:
    linears = (
        LinearShape("self_attn.qkv_proj", d.hidden, d.query + 2 * d.key),
        LinearShape("self_attn.o_proj", d.query, d.hidden),
        LinearShape("mlp.gate_up_proj", d.hidden, 2 * d.intermediate),
        LinearShape("mlp.down_proj", d.intermediate, d.hidden),
    )
    return LayerParts(linears, 2 * d.hidden)


def _olmo(d: Dimensions, config: Mapping[str, Any]) -> LayerParts:
    # OLMo's first generation normalises without learned gains.
    parts = _gemma(d, config)
    return LayerParts(parts.linears, 0)


def _olmo2(d: Dimensions, config: Mapping[str, Any]) -> LayerParts:
    parts = _gemma(d, config)
    return LayerParts(parts.linears, 2 * d.hidden + d.query + d.key)


def _stablelm(d: Dimensions, config: Mapping[str, Any]) -> LayerParts:
    attention = _attention(d, qkv_bias=bool(config.get("use_qkv_bias")))
    norms = 2 * d.hidden if config.get("use_parallel_residual") else 4 * d.hidden
    if config.get("qk_layernorm"):
        norms += d.query + d.key
    return LayerParts(attention + _gated_mlp(d.hidden, d.intermediate), norms)


def _experts(hidden: int, intermediate: int, count: int) -> int:
    return count * (3 * hidden * intermediate + hidden)


def _mixtral(d: Dimensions, config: Mapping[str, Any]) -> LayerParts:
    experts = _experts(d.hidden, d.intermediate, expert_count(config))
    return LayerParts(_attention(d), 2 * d.hidden, experts)


def _qwen2_moe(d: Dimensions, config: Mapping[str, Any]) -> LayerParts:
    shared = _gated_mlp(d.hidden, config["shared_expert_intermediate_size"], prefix="mlp.shared_expert.")
    linears = _attention(d, qkv_bias=bool(config["qkv_bias"])) + shared
    linears += (LinearShape("mlp.shared_expert_gate", d.hidden, 1),)
    experts = _experts(d.hidden, config["moe_intermediate_size"], expert_count(config))
    return LayerParts(linears, 2 * d.hidden, experts)


def _qwen3_moe(d: Dimensions, config: Mapping[str, Any]) -> LayerParts:
    bias = bool(config.get("attention_bias"))
    experts = _experts(d.hidden, config["moe_intermediate_size"], expert_count(config))
    return LayerParts(_attention(d, qkv_bias=bias, output_bias=bias), 2 * d.hidden + 2 * d.head_dim, experts)


def _gpt_oss(d: Dimensions, config: Mapping[str, Any]) -> LayerParts:
    bias = bool(config.get("attention_bias"))
    count = expert_count(config)
    experts = count * (3 * d.hidden * d.intermediate + 2 * d.intermediate + d.hidden) + count * (d.hidden + 1)
    # The attention sinks, one value a head, belong to no linear; they are counted beside the norms.
    norms = 2 * d.hidden + d.heads
    return LayerParts(_attention(d, qkv_bias=bias, output_bias=bias), norms, experts)


def expert_count(config: Mapping[str, Any]) -> int:
    """Routed experts of one layer, under either of the two names that configs use."""
    value = config.get("num_local_experts", config.get("num_experts"))
    return int(value) if value is not None else 8


_TIED = {"tie_word_embeddings": True}
_GEMMA = _TIED | {"head_dim": 256}
_QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_QWEN2_MOE = {
    "qkv_bias": True,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "decoder_sparse_step": 1,
}
_MIXTRAL = {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}
_QWEN3_MOE = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1}
_GEMMA3 = _GEMMA | {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}
_GPT_OSS = {"head_dim": 64, "attention_bias": True, "num_local_experts": 128, "num_experts_per_tok": 4}

FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", _llama),
    "mistral": Family("MistralForCausalLM", _plain, {"num_key_value_heads": 8}),
    "ministral": Family("MinistralForCausalLM", _plain, {"num_key_value_heads": 8}),
    "ministral3": Family("Ministral3ForCausalLM", _plain, {"num_key_value_heads": 8, "head_dim": 128}),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, _QWEN),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, _QWEN | {"head_dim": 128}),
    "gemma": Family("GemmaForCausalLM", _gemma, _GEMMA),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _gemma2,
        _GEMMA
        | {
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 2,
        },
    ),
    "gemma3_text": Family("Gemma3ForCausalLM", _gemma3, _GEMMA3),
    "phi3": Family("Phi3ForCausalLM", _phi3),
    "smollm3": Family("SmolLM3ForCausalLM", _llama, _TIED),
    "olmo": Family("OlmoForCausalLM", _olmo, final_norm=0),
    "olmo2": Family("Olmo2ForCausalLM", _olmo2),
    "olmo3": Family("Olmo3ForCausalLM", _olmo2, {"sliding_window": 4096, "sliding_window_pattern": 4}),
    "granite": Family("GraniteForCausalLM", _llama),
    "stablelm": Family("StableLmForCausalLM", _stablelm, final_norm=2),
    "mixtral": Family("MixtralForCausalLM", _mixtral, _MIXTRAL),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", _qwen2_moe, _QWEN2_MOE),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _qwen3_moe, _QWEN3_MOE),
    "gpt_oss": Family("GptOssForCausalLM", _gpt_oss, _GPT_OSS),
}
"""By `model_type`; every layer of these is alike."""

LANGUAGE_TOWERS: Mapping[str, str] = {
    "gemma3": "gemma3_text",
    "mistral3": "mistral",
    "llava": "llama",
    "llava_next": "llama",
    "idefics3": "llama",
    "smolvlm": "llama",
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    "qwen3_vl_moe_text": "qwen3_moe",
    "internvl": "qwen2",
}
"""Vision-language model types, or the type in their `text_config`, to the family of their language tower."""
