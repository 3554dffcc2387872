"""A base model without values: transformers' own modules over fake tensors, made from a config alone.

Its linears are replaced by the code that loads real models, so whatever holds a matrix has the sizes that it has there.
Must be called with a `FakeTensorMode` in force.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from edgepeft.engine.model.checkpoint import drop_other_towers, silence_transformers
from edgepeft.engine.model.load import decoder_layers, inner_decoder
from edgepeft.errors import BadInput
from edgepeft.models.config import language_config, positive, read_shape
from edgepeft.models.families import FAMILIES

MOST_LAYERS = 2000
"""More decoder layers than this are a mistake in the config."""
_ANEW = "Take the model's config.json anew from where it came from"


def read_config(config: Mapping[str, Any]) -> Any:
    """The transformers config of a parsed config.json; nothing remote is ever run.

    Raises:
        BadInput: its kind is unknown to transformers, a number is missing or cannot be, or it is no language model.
    """
    silence_transformers()
    model_type = str(config.get("model_type") or "")
    if model_type not in CONFIG_MAPPING:
        named = ", ".join(map(str, config.get("architectures") or [])) or "no architecture"
        raise BadInput(
            f"transformers does not know this model: model_type {model_type or 'missing'!r}, {named}",
            where="config.json",
            hint="Use a decoder-only language model that transformers has; code that comes with a model is never run",
        )
    _check_numbers(config, CONFIG_MAPPING[model_type])
    # Weights that were quantized elsewhere are planned for as if they were in 16 bit: they end up alike.
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    try:
        read: Any = CONFIG_MAPPING[model_type].from_dict(plain)
    except Exception as error:
        raise BadInput(f"transformers refuses it: {_first_line(error)}", where="config.json", hint=_ANEW) from error
    return read


def _check_numbers(config: Mapping[str, Any], kind: Any) -> None:
    """Refuses what is missing or cannot be; transformers would put its own defaults in the place of what is missing."""
    text = language_config(config)
    if text["model_type"] in FAMILIES:
        read_shape(config)
    else:
        names = getattr(kind, "attribute_map", {})
        inner = isinstance(config.get("text_config"), Mapping)
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
            name = names.get(key, key)
            if not inner or name in text:
                positive({name: text.get(name, text.get(key))}, name)
    layers = text.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise BadInput(f"num_hidden_layers is {layers}, which no model has", where="config.json", hint=_ANEW)


def layer_count(config: Any) -> int:
    """Decoder layers of the language model.

    Raises:
        BadInput: the config does not say.
    """
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(count, int) or not 1 <= count <= MOST_LAYERS:
        raise BadInput(f"num_hidden_layers is {count!r}", where="config.json", hint=_ANEW)
    return count


def layer_period(config: Any) -> int:
    """After how many layers their kinds repeat: 1 where all are alike, 6 for Gemma 3's five local ones and a global."""
    lists = _layer_lists(config.get_text_config(), layer_count(config)).values()
    kinds = list(zip(*lists, strict=True))
    repeats = (p for p in range(1, len(kinds)) if all(a == b for a, b in zip(kinds, kinds[p:], strict=False)))
    return next(repeats, max(1, len(kinds)))


def with_layers(config: Any, layers: int) -> Any:
    """The config of a model that has only the first `layers` layers."""
    shorter = copy.deepcopy(config)
    text = shorter.get_text_config()
    for name, values in _layer_lists(text, layer_count(config)).items():
        setattr(text, name, values[:layers])
    text.num_hidden_layers = layers
    return shorter


def build_model(config: Any) -> PreTrainedModel:
    """The model of `config` as it is opened from its files: its parameters in their dtype, not yet taken over.

    Raises:
        BadInput: transformers has no causal language model of that kind, or its numbers do not go together.
    """
    auto: Any = AutoModelForCausalLM
    if type(config) not in auto._model_mapping:
        auto = AutoModelForImageTextToText
    if type(config) not in auto._model_mapping:
        raise BadInput(
            f"transformers has no causal language model of model_type {config.model_type!r}",
            where="config.json",
            hint="Use a decoder-only language model",
        )
    dtype = config.dtype or config.get_text_config().dtype or torch.float32
    try:
        with no_init_weights():
            model: PreTrainedModel = auto.from_config(config, dtype=dtype)
        # Tying belongs to what `no_init_weights` leaves out.
        model.tie_weights()
        drop_other_towers(model)
        for module in model.modules():
            if getattr(module, "rope_type", None) == "dynamic":
                # Its frequencies depend on the positions' values; their sizes do not.
                module.rope_type = "default"
    except Exception as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"no model can be made of it: {_first_line(error)}", where="config.json", hint=_ANEW) from error
    model.requires_grad_(False)
    model.eval()
    return model


def layers_repeat(model: PreTrainedModel, period: int) -> bool:
    """Whether each decoder layer has the modules and shapes of the one `period` layers before it."""
    forms = [_form(layer) for layer in decoder_layers(inner_decoder(model))]
    return all(a == b for a, b in zip(forms, forms[period:], strict=False))


def _form(layer: nn.Module) -> list[tuple[str, str, tuple[tuple[int, ...], ...]]]:
    return [
        (name, type(module).__name__, tuple(tuple(_size(value)) for value in module.parameters(recurse=False)))
        for name, module in layer.named_modules()
    ]


def _size(value: Tensor) -> torch.Size:
    return value.shape


def _layer_lists(text: Any, layers: int) -> dict[str, list[Any]]:
    """The config's values that are given layer by layer."""
    return {
        name: list(value)
        for name, value in vars(text).items()
        if isinstance(value, list | tuple) and len(value) == layers and not name.startswith("_")
    }


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
