"""The shape of a decoder that edgepeft has no entry for, derived from the names and shapes of its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from edgepeft.errors import BadInput
from edgepeft.models.config import class_names, softcap
from edgepeft.models.headers import TensorHeader
from edgepeft.models.shape import LinearShape, ModelShape

_IN_LAYER = re.compile(r"^(?:.*\.)?(?:layers|h|blocks)\.(\d+)\.(.+)$")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output)\.weight$")
_EXPERT = re.compile(r"(?:^|\.)experts?\.|router|\.gate\.weight$")
_BUFFER = re.compile(r"rotary_emb\.inv_freq$|masked_bias$|\.attn\.bias$")
_TRANSPOSED = ("gpt2", "imagegpt", "openai-gpt")


def shape_from_headers(config: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> ModelShape:
    """The shape of a decoder-only model from `config` and the headers of its weights.

    Raises:
        BadInput: it is no causal language model, its layers are not alike, or its weights follow no known naming.
    """
    architecture = next(iter(class_names(config)), "")
    model_type = str(config.get("model_type", ""))
    if not architecture.endswith(("ForCausalLM", "LMHeadModel")) or model_type in _TRANSPOSED:
        raise _unknown(config, "it is not a causal language model made of linear layers")
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    outside: dict[str, TensorHeader] = {}
    for name, tensor in tensors.items():
        if _BUFFER.search(name):
            continue
        match = _IN_LAYER.match(name)
        if match is None:
            outside[name] = tensor
        else:
            layers.setdefault(int(match.group(1)), {})[match.group(2)] = tensor.shape
    embedding = next((tensor for name, tensor in outside.items() if _EMBEDDING.search(name)), None)
    if embedding is None or len(embedding.shape) != 2 or not layers:
        raise _unknown(config, "its weights follow no known naming")
    first = layers[min(layers)]
    if any(layer != first for layer in layers.values()):
        raise _unknown(config, "its layers differ in shape, and edgepeft needs layers that are alike")
    linears, norms, experts = _layer_parts(first)
    if not linears:
        raise _unknown(config, "its layers hold no linear modules")
    vocab, hidden = embedding.shape
    head = [name for name in outside if _HEAD.search(name)]
    tied = not head or bool(config.get("tie_word_embeddings"))
    rest = sum(tensor.entries for name, tensor in outside.items() if not _EMBEDDING.search(name) and name not in head)
    heads = _number(config, "num_attention_heads", "n_head", "n_heads") or 1
    return ModelShape(
        architecture=architecture,
        model_type=model_type,
        layers=len(layers),
        hidden=hidden,
        intermediate=_number(config, "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
        or max(linear.out_features for linear in linears),
        heads=heads,
        kv_heads=_number(config, "num_key_value_heads", "num_kv_heads") or heads,
        head_dim=_number(config, "head_dim") or hidden // heads,
        vocab=vocab,
        context_length=_number(config, "max_position_embeddings", "n_positions", "max_seq_len", "seq_length") or 2048,
        tied_embeddings=tied,
        linears=tuple(linears),
        norm_parameters=norms,
        final_norm_parameters=rest,
        expert_parameters=experts,
        attention_softcap=softcap(config, "attn_logit_softcapping"),
        logit_softcap=softcap(config, "final_logit_softcapping"),
        sliding_window=_number(config, "sliding_window") if config.get("use_sliding_window", True) else None,
    )


def _layer_parts(layer: Mapping[str, tuple[int, ...]]) -> tuple[list[LinearShape], int, int]:
    """The linears, the entries of norms, and the entries of experts with their router."""
    has_experts = any(len(shape) == 3 or re.search(r"experts?\.\d+\.", name) for name, shape in layer.items())
    linears: list[LinearShape] = []
    norms = experts = 0
    for name, shape in layer.items():
        entries = 1
        for size in shape:
            entries *= size
        module, _, kind = name.rpartition(".")
        if len(shape) > 2 or (has_experts and _EXPERT.search(name) and "shared" not in name):
            experts += entries
        elif len(shape) == 2 and kind == "weight":
            linears.append(LinearShape(module, shape[1], shape[0], f"{module}.bias" in layer))
        elif not (kind == "bias" and len(layer.get(f"{module}.weight", ())) == 2):
            norms += entries
    return linears, norms, experts


def _number(config: Mapping[str, Any], *keys: str) -> int | None:
    return next((config[key] for key in keys if isinstance(config.get(key), int) and config[key] > 0), None)


def _unknown(config: Mapping[str, Any], reason: str) -> BadInput:
    named = ", ".join(class_names(config)) or str(config.get("model_type") or "an unnamed architecture")
    return BadInput(
        f"{named} is not known to edgepeft, and {reason}",
        where="config.json",
        hint="Use a decoder of the Llama, Mistral, Qwen, Gemma, Phi, SmolLM, OLMo, Granite or StableLM kind",
    )
