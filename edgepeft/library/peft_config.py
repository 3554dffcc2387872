"""What an adapter_config.json asks for, PEFT's or our own, and whether it can be done here; no tensor is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from edgepeft.errors import BadInput
from edgepeft.methods import METHODS

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before every module path in its files."""
OWN_PREFIX = "EDGEPEFT_"
"""Begins the `peft_type` of a method that PEFT does not have; its id follows."""
OWN_KEY = "edgepeft"
"""Where the config of such a method stands."""
_BY_TYPE = {method.peft_type or OWN_PREFIX + name.upper(): name for name, method in METHODS.items()}
# PEFT knows sparse adapters of some sizes alone.
_BY_TYPE[f"{OWN_PREFIX}SPARSE"] = "sparse"

UNSUPPORTED = {
    "use_qalora": "QALoRA",
    "modules_to_save": "whole modules beside the update (modules_to_save)",
    "lora_bias": "biases of its own (lora_bias)",
    "trainable_token_indices": "trained token embeddings",
    "layer_replication": "replicated layers",
    "target_parameters": "updates of single parameters (target_parameters)",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
}
"""Settings that change what an adapter computes in a way that is not implemented here."""
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations for which PEFT changes the base's weights; PEFT's own conversion to a plain LoRA writes `true`."""


def method_id_of(settings: Mapping[str, Any], where: str) -> str:
    """The id of the method that an adapter is of.

    Args:
        settings: of adapter_config.json.
        where: the file, for messages.

    Raises:
        BadInput: it is of none that is known here, or uses what is not.
    """
    check_supported(settings, where)
    return _BY_TYPE[str(settings["peft_type"])]


def leading_tokens(settings: Mapping[str, Any]) -> int:
    """Places of the context that an adapter takes before every sample."""
    count = settings.get("num_virtual_tokens")
    return count if isinstance(count, int) else 0


def check_supported(settings: Mapping[str, Any], where: str) -> None:
    """Refuses an adapter that computes something that is not implemented here.

    Args:
        settings: of adapter_config.json.
        where: the file, for messages.

    Raises:
        BadInput: saying which setting is in the way.
    """
    kind = settings.get("peft_type")
    if kind not in _BY_TYPE:
        hint = f"Known are {', '.join(_BY_TYPE)}; merge it into its base with PEFT, then add the merged model"
        raise BadInput(f"the adapter is of type {kind}, which cannot be loaded", where=where, hint=hint)
    for key, what in UNSUPPORTED.items():
        if settings.get(key):
            hint = "Merge it into its base in PEFT, or train it without"
            raise BadInput(f"the adapter uses {what}, which cannot be loaded", where=where, hint=hint)
    if settings.get("bias", "none") != "none":
        raise BadInput("the adapter trained biases of the base, which cannot be loaded", where=where)
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVES_BASE):
        raise BadInput(
            f"the adapter belongs to a base whose weights PEFT changed (init_lora_weights {start})",
            where=where,
            hint="Save it in PEFT with path_initial_model_for_weight_conversion, which makes it a plain LoRA",
        )


def plain_lora_config(
    base_name: Any,
    rank: int,
    alpha: float,
    targets: list[str],
    *,
    rank_pattern: Mapping[str, float] = MappingProxyType({}),
    alpha_pattern: Mapping[str, float] = MappingProxyType({}),
    task_type: str = "CAUSAL_LM",
    fan_in_fan_out: bool = False,
) -> dict[str, Any]:
    """adapter_config.json of a LoRA that is nothing but its products.

    Args:
        base_name: for `base_model_name_or_path`.
        rank: of most linears.
        alpha: of them.
        targets: module names.
        rank_pattern: ranks of other linears, by pattern.
        alpha_pattern: alphas of other linears, by pattern.
        task_type: as PEFT calls it.
        fan_in_fan_out: whether the base's matrices are transposed.
    """
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "rank_pattern": dict(rank_pattern),
        "alpha_pattern": dict(alpha_pattern),
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "use_dora": False,
        "use_rslora": False,
    }


def is_restricted(settings: Mapping[str, Any]) -> bool:
    """Whether target_modules alone does not say which layers are changed."""
    return any(settings.get(key) is not None for key in ("layers_to_transform", "layers_pattern", "exclude_modules"))


def value_by_pattern(patterns: Mapping[str, Any] | None, path: str, default: float) -> float:
    """The value of the first pattern that ends `path`, as PEFT matches rank_pattern and alpha_pattern."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return float(value)
    return default


def check_patterns(settings: Mapping[str, Any], where: str) -> None:
    """Refuses a rank_pattern or an alpha_pattern that is no table of numbers above 0 by regular expressions.

    Raises:
        BadInput: saying which.
    """
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(key) or {}
        try:
            sound = isinstance(patterns, dict) and all(
                isinstance(value, int | float) and value > 0 and re.compile(pattern)
                for pattern, value in patterns.items()
            )
        except re.error:
            sound = False
        if not sound:
            raise BadInput(
                f"{key} must give a number above 0 for each module pattern", where=where, hint="Save the adapter anew"
            )
