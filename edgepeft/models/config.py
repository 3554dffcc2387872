"""From a model's config.json to its `ModelShape`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgepeft.errors import BadInput
from edgepeft.models.families import FAMILIES, LANGUAGE_TOWERS, Dimensions, expert_count
from edgepeft.models.shape import ModelShape

_LARGEST: Mapping[str, int] = {
    "num_hidden_layers": 1_000,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "moe_intermediate_size": 1 << 20,
    "shared_expert_intermediate_size": 1 << 20,
    "num_attention_heads": 4_096,
    "num_key_value_heads": 4_096,
    "head_dim": 4_096,
    "vocab_size": 1 << 23,
    "max_position_embeddings": 1 << 30,
    "num_experts": 10_000,
    "num_local_experts": 10_000,
}
"""Key → a value well above that of every published model; more is a damaged or an invented config."""
_ANEW = "Take the model's config.json anew from where it came from"


def read_shape(config: Mapping[str, Any]) -> ModelShape:
    """The shape that `config` (a parsed config.json) describes; of a vision-language model, its language tower.

    Raises:
        BadInput: the architecture is not known, a number is missing or impossible, or the layers differ in shape.
    """
    text = language_config(config)
    model_type = text["model_type"]
    family = FAMILIES.get(model_type)
    if family is None:
        named = ", ".join(class_names(config)) or "no architecture"
        raise BadInput(
            f"the architecture is not known: model_type {model_type or 'missing'!r}, {named}",
            where="config.json",
            hint="Known model types: " + ", ".join(FAMILIES),
        )
    text = {**family.defaults, **{key: value for key, value in text.items() if value is not None}}
    _refuse_uneven_layers(text)
    for key in ("attention_bias", "mlp_bias", "qkv_bias", "use_qkv_bias", "qk_layernorm", "use_parallel_residual"):
        _truth(text, key)
    for key in ("num_experts", "num_local_experts", "moe_intermediate_size", "shared_expert_intermediate_size"):
        if key in text:
            positive(text, key)
    sizes = read_dimensions(text)
    parts = family.build(sizes, text)
    return ModelShape(
        architecture=family.architecture,
        model_type=model_type,
        layers=positive(text, "num_hidden_layers"),
        hidden=sizes.hidden,
        intermediate=sizes.intermediate,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        vocab=positive(text, "vocab_size"),
        context_length=positive(text, "max_position_embeddings"),
        tied_embeddings=_truth(text, "tie_word_embeddings"),
        linears=parts.linears,
        norm_parameters=parts.norm_parameters,
        final_norm_parameters=family.final_norm * sizes.hidden,
        expert_parameters=parts.expert_parameters,
        experts=expert_count(text) if parts.expert_parameters else 0,
        experts_per_token=positive(text, "num_experts_per_tok") if parts.expert_parameters else 0,
        expert_intermediate=positive(text, _expert_width(text)) if parts.expert_parameters else 0,
        attention_softcap=softcap(text, "attn_logit_softcapping"),
        logit_softcap=softcap(text, "final_logit_softcapping"),
        sliding_window=_sliding_window(text),
        full_attention_layers=_full_attention_layers(text),
        rotary_share=_rotary_share(text),
    )


def language_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `config` that describes the language model, with its `model_type` as a causal model has it.

    Raises:
        BadInput: `model_type` is no text.
    """
    inner = config.get("text_config")
    text = dict(inner) if isinstance(inner, Mapping) else dict(config)
    model_type = text.get("model_type") or config.get("model_type") or ""
    if not isinstance(model_type, str):
        raise _wrong(f"model_type is {model_type!r:.60}, not a name")
    if model_type not in FAMILIES and (inner is not None or model_type in LANGUAGE_TOWERS):
        model_type = LANGUAGE_TOWERS.get(model_type, LANGUAGE_TOWERS.get(str(config.get("model_type")), model_type))
    text["model_type"] = model_type
    if inner is not None and "tie_word_embeddings" not in text and "tie_word_embeddings" in config:
        text["tie_word_embeddings"] = config["tie_word_embeddings"]
    return text


def class_names(config: Mapping[str, Any]) -> list[str]:
    """What `architectures` lists; empty when it is no list."""
    classes = config.get("architectures")
    return [str(name) for name in classes] if isinstance(classes, list) else []


def is_vision_language(config: Mapping[str, Any]) -> bool:
    """Whether the config belongs to a model of more than language."""
    return (
        any(key in config for key in ("vision_config", "audio_config"))
        or str(config.get("model_type")) in LANGUAGE_TOWERS
    )


def read_dimensions(config: Mapping[str, Any]) -> Dimensions:
    """The widths and head counts of a language model's config.

    Raises:
        BadInput: one is missing, impossible, or does not go with another.
    """
    hidden = positive(config, "hidden_size")
    heads = positive(config, "num_attention_heads")
    if "head_dim" in config:
        head_dim = positive(config, "head_dim")
    else:
        head_dim = hidden // heads
        if hidden % heads:
            raise _wrong(f"hidden_size {hidden:,} cannot be divided among num_attention_heads {heads:,}")
    kv_heads = positive(config, "num_key_value_heads") if "num_key_value_heads" in config else heads
    if heads % kv_heads:
        raise _wrong(f"num_attention_heads {heads:,} is no multiple of num_key_value_heads {kv_heads:,}")
    intermediate = positive(config, "intermediate_size")
    return Dimensions(hidden=hidden, intermediate=intermediate, heads=heads, kv_heads=kv_heads, head_dim=head_dim)


def positive(config: Mapping[str, Any], key: str) -> int:
    """`config[key]` as a positive whole number.

    Raises:
        BadInput: it is missing, something else, or larger than that of any model.
    """
    value = config.get(key)
    if value is None:
        raise _wrong(f"{key} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _wrong(f"{key} is {value!r:.60}, not a positive whole number")
    if value > _LARGEST.get(key, value):
        raise _wrong(f"{key} is {value:,}, more than any model has")
    return value


def _truth(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise _wrong(f"{key} is {value!r:.60}, neither true nor false")
    return value


def softcap(config: Mapping[str, Any], key: str) -> float | None:
    """`config[key]` as the bound of a soft cap; None when there is none.

    Raises:
        BadInput: it is no number above zero.
    """
    value = config.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise _wrong(f"{key} is {value!r:.60}, not a number above zero")
    return float(value)


def _expert_width(config: Mapping[str, Any]) -> str:
    return "moe_intermediate_size" if "moe_intermediate_size" in config else "intermediate_size"


def _wrong(what: str) -> BadInput:
    return BadInput(what, where="config.json", hint=_ANEW)


def _refuse_uneven_layers(config: Mapping[str, Any]) -> None:
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise BadInput(
            "some layers have experts and others have none, and edgepeft needs layers that are alike",
            where="config.json",
            hint="Use a model whose layers are all dense, or all of experts",
        )


def _sliding_window(config: Mapping[str, Any]) -> int | None:
    window = config.get("sliding_window")
    if window is None or not _truth({"use_sliding_window": True, **config}, "use_sliding_window"):
        return None
    if isinstance(window, bool) or not isinstance(window, int) or window < 0:
        raise _wrong(f"sliding_window is {window!r:.60}, not a whole number")
    return window or None


def _full_attention_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers without the window, where the model has one."""
    layers = positive(config, "num_hidden_layers")
    if _sliding_window(config) is None:
        return ()
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        return tuple(number for number, kind in enumerate(kinds[:layers]) if kind == "full_attention")
    if "max_window_layers" in config:
        return tuple(range(min(layers, positive(config, "max_window_layers"))))
    if "sliding_window_pattern" not in config:
        return ()
    pattern = positive(config, "sliding_window_pattern")
    return tuple(range(pattern - 1, layers, pattern))


def _rotary_share(config: Mapping[str, Any]) -> float:
    nested = config.get("rope_parameters") or config.get("rope_scaling")
    share = config.get("partial_rotary_factor")
    if share is None and isinstance(nested, Mapping):
        share = nested.get("partial_rotary_factor")
    if share is None:
        return 1.0
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise _wrong(f"partial_rotary_factor is {share!r:.60}, not a share")
    return float(share)
