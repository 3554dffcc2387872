"""What an adapter_config.json asks for, PEFT's or our own, and whether it can be done here; no tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgepeft.errors import BadInput
from edgepeft.methods import METHODS

OWN_PREFIX = "EDGEPEFT_"
"""Begins the `peft_type` of a method that PEFT does not have; its id follows."""
OWN_KEY = "edgepeft"
"""Where the config of such a method stands."""
_BY_TYPE = {method.peft_type or OWN_PREFIX + name.upper(): name for name, method in METHODS.items()}

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
