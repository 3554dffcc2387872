"""What an adapter_config.json of PEFT asks for, and whether it can be done here; no tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgepeft.errors import BadInput

UNSUPPORTED = {
    "use_dora": "DoRA",
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


def check_supported(settings: Mapping[str, Any], where: str) -> None:
    """Refuses an adapter that computes something else than a LoRA beside linear layers.

    Args:
        settings: of adapter_config.json.
        where: the file, for messages.

    Raises:
        BadInput: saying which setting is in the way.
    """
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise BadInput(f"the adapter is of type {kind}, only LORA can be loaded", where=where)
    for key, what in UNSUPPORTED.items():
        if settings.get(key):
            hint = "Merge it into its base in PEFT, or train it without"
            raise BadInput(f"the adapter uses {what}, which cannot be loaded", where=where, hint=hint)
    if settings.get("bias", "none") != "none":
        raise BadInput("the adapter trained biases of the base, which cannot be loaded", where=where)
