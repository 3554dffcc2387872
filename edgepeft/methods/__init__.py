"""PEFT methods, the light half: configs, parameter counts and memory terms.

`MethodConfig` is the union that a recipe holds; each member is tagged with its id. The tensors of method NAME are in
`edgepeft/engine/methods/NAME.py`. What everybody else knows of a method is `Method`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_origin, get_type_hints

import msgspec

from edgepeft.errors import UsageError
from edgepeft.methods.bias import Bias, BiasConfig
from edgepeft.methods.bottleneck import Bottleneck, BottleneckConfig
from edgepeft.methods.compacter import Compacter, CompacterConfig
from edgepeft.methods.full import Full, FullConfig
from edgepeft.methods.ia3 import Ia3, Ia3Config
from edgepeft.methods.lora import Lora, LoraConfig
from edgepeft.methods.norm import Norm, NormConfig
from edgepeft.methods.prefix import Prefix, PrefixConfig
from edgepeft.methods.prompt import Prompt, PromptConfig
from edgepeft.methods.sparse import Sparse, SparseConfig
from edgepeft.methods.terms import Branch, BranchTerms, LinearTerms, Method, PrefixTerms, TableTerms, Trained
from edgepeft.models.shape import ModelShape

MethodConfig = (
    LoraConfig
    | BottleneckConfig
    | CompacterConfig
    | Ia3Config
    | NormConfig
    | BiasConfig
    | PrefixConfig
    | PromptConfig
    | SparseConfig
    | FullConfig
)

METHODS: dict[str, Method] = {
    "lora": Lora(LoraConfig),
    "bottleneck": Bottleneck(BottleneckConfig),
    "compacter": Compacter(CompacterConfig),
    "ia3": Ia3(Ia3Config),
    "norm": Norm(NormConfig),
    "bias": Bias(BiasConfig),
    "prefix": Prefix(PrefixConfig),
    "full": Full(FullConfig),
    "prompt": Prompt(PromptConfig),
    "sparse": Sparse(SparseConfig),
}
"""Every method by its id."""


def id_of(config: MethodConfig) -> str:
    """The id of the method that a config belongs to."""
    return str(config.__struct_config__.tag)


def method_of(config: MethodConfig) -> Method:
    """The method that a config belongs to."""
    return METHODS[id_of(config)]


def make_config(method: str, settings: Mapping[str, Any]) -> MethodConfig:
    """The config of a method from what was typed; everything else has its default.

    Args:
        method: its id.
        settings: field → value, or its text; several names in a text are divided by commas.

    Raises:
        UsageError: the method has no such field, or a value cannot be meant.
    """
    kind: Any = METHODS[method].config_type
    types = get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in kind.__struct_fields__:
            known = ", ".join(kind.__struct_fields__)
            hint = f"It has {known}" if known else "It has no settings"
            raise UsageError(f"the method {method} has no {name}", where=name.replace("_", "-"), hint=hint)
        values[name] = value
        kind_of_value = get_origin(types[name])
        if isinstance(value, str) and kind_of_value in (tuple, dict):
            parts = [part.strip() for part in value.split(",") if part.strip()]
            values[name] = parts if kind_of_value is tuple else dict(_pair(name, part) for part in parts)
    try:
        config: MethodConfig = msgspec.convert(values | {"type": method}, kind, strict=False)
    except msgspec.ValidationError as error:
        what, _, field = str(error).partition(" - at `$.")
        raise UsageError(
            what, where=f"--set {field.rstrip('`')}", hint=f"See: edgepeft methods show {method}"
        ) from None
    return config


def method_values(config: MethodConfig) -> dict[str, str]:
    """What a method's config decides, by option name, as people write it."""
    return {name.replace("_", "-"): _shown(getattr(config, name)) for name in config.__struct_fields__}


def _shown(value: object) -> str:
    if isinstance(value, dict):
        value = tuple(f"{name}:{number}" for name, number in value.items())
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _pair(field: str, text: str) -> tuple[str, str]:
    name, _, value = (part.strip() for part in text.partition(":"))
    if not name or not value:
        hint = "Write NAME:VALUE with commas between, such as q_proj:8,down_proj:32"
        raise UsageError(f"{text!r} gives no value to a name", where=f"--set {field}", hint=hint)
    return name, value


def no_lora_plus(config: MethodConfig) -> str:
    """Why LoRA+ is refused for a method without low-rank factors."""
    return f"LoRA+ gives LoRA's B another learning rate than A, and {id_of(config)} has neither"


def count_parameters(config: MethodConfig, shape: ModelShape) -> int:
    """Trainable entries of the whole model.

    Raises:
        UsageError: the config does not suit the model.
    """
    return method_of(config).trained(config, shape).parameters(shape.layers)


__all__ = [
    "METHODS",
    "Branch",
    "BranchTerms",
    "FullConfig",
    "LinearTerms",
    "LoraConfig",
    "Method",
    "MethodConfig",
    "PrefixTerms",
    "TableTerms",
    "Trained",
    "count_parameters",
    "id_of",
    "make_config",
    "method_of",
    "method_values",
    "no_lora_plus",
]
