"""From a model's config.json to its `ModelShape`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgepeft.errors import BadInput
from edgepeft.models.families import FAMILIES, LANGUAGE_TOWERS, Dimensions
from edgepeft.models.shape import ModelShape


def read_shape(config: Mapping[str, Any]) -> ModelShape:
    """The shape that `config` (a parsed config.json) describes; of a vision-language model, its language tower.

    Raises:
        BadInput: the architecture is not known, a number is missing or impossible, or the layers differ in shape.
    """
    text = language_config(config)
    model_type = str(text.get("model_type", ""))
    family = FAMILIES.get(model_type)
    if family is None:
        named = ", ".join(config.get("architectures") or []) or "no architecture"
        raise BadInput(
            f"the architecture is not known: model_type {model_type or 'missing'!r}, {named}",
            where="config.json",
            hint="Known model types: " + ", ".join(FAMILIES),
        )
    text = {**family.defaults, **{key: value for key, value in text.items() if value is not None}}
    _refuse_uneven_layers(text)
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
        tied_embeddings=bool(text.get("tie_word_embeddings", False)),
        linears=parts.linears,
        norm_parameters=parts.norm_parameters,
        final_norm_parameters=family.final_norm * sizes.hidden,
        expert_parameters=parts.expert_parameters,
        attention_softcap=text.get("attn_logit_softcapping"),
        logit_softcap=text.get("final_logit_softcapping"),
        sliding_window=_sliding_window(text),
    )


def language_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `config` that describes the language model, with its `model_type` as a causal model has it."""
    inner = config.get("text_config")
    text = dict(inner) if isinstance(inner, Mapping) else dict(config)
    model_type = text.get("model_type") or config.get("model_type")
    if model_type not in FAMILIES and (inner is not None or model_type in LANGUAGE_TOWERS):
        model_type = LANGUAGE_TOWERS.get(
            str(model_type), LANGUAGE_TOWERS.get(str(config.get("model_type")), model_type)
        )
    text["model_type"] = model_type
    if inner is not None and "tie_word_embeddings" not in text and "tie_word_embeddings" in config:
        text["tie_word_embeddings"] = config["tie_word_embeddings"]
    return text


def is_vision_language(config: Mapping[str, Any]) -> bool:
    """Whether the config belongs to a model of more than language."""
    return (
        any(key in config for key in ("vision_config", "audio_config")) or config.get("model_type") in LANGUAGE_TOWERS
    )


def read_dimensions(config: Mapping[str, Any]) -> Dimensions:
    """The widths and head counts of a language model's config.

    Raises:
        BadInput: one is missing, or not a positive whole number.
    """
    hidden = positive(config, "hidden_size")
    heads = positive(config, "num_attention_heads")
    head_dim = positive(config, "head_dim") if config.get("head_dim") else hidden // heads
    kv_heads = positive(config, "num_key_value_heads") if config.get("num_key_value_heads") else heads
    intermediate = positive(config, "intermediate_size")
    return Dimensions(hidden=hidden, intermediate=intermediate, heads=heads, kv_heads=kv_heads, head_dim=head_dim)


def positive(config: Mapping[str, Any], key: str) -> int:
    """`config[key]` as a positive whole number.

    Raises:
        BadInput: it is missing, or something else.
    """
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        what = f"{key} is missing" if value is None else f"{key} is {value!r}, not a positive whole number"
        raise BadInput(what, where="config.json", hint="Take the model's config.json anew from where it came from")
    return value


def _refuse_uneven_layers(config: Mapping[str, Any]) -> None:
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise BadInput(
            "some layers have experts and others have none, and edgepeft needs layers that are alike",
            where="config.json",
            hint="Use a model whose layers are all dense, or all of experts",
        )


def _sliding_window(config: Mapping[str, Any]) -> int | None:
    window = config.get("sliding_window")
    if config.get("use_sliding_window") is False or not isinstance(window, int) or window < 1:
        return None
    return window
