"""Activation checkpointing: which decoder layers keep their inside for backward, and which form it again.

Chen et al. 2016, *Training Deep Nets with Sublinear Memory Cost* (arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from edgepeft.spec import Checkpointing


def set_checkpointing(layers: Sequence[nn.Module], mode: Checkpointing) -> None:
    """Switches all decoder layers to `mode`; it may be called again with another one at any time between steps.

    With `layer`, each layer keeps only its input and runs again in backward, under the same packing context.
    """
    for layer in layers:
        # An instance attribute hides the class's forward; removing it brings that one back.
        layer.__dict__.pop("forward", None)
        if mode == "layer":
            layer.__dict__["forward"] = _checkpointed(layer.forward)


def _checkpointed(forward: Any) -> Any:
    def run(*arguments: Any, **options: Any) -> Any:
        # Dropout is a pure function of seed, step and sample, so there is no generator whose state would matter.
        return checkpoint(
            forward, *arguments, use_reentrant=False, preserve_rng_state=False, determinism_check="none", **options
        )

    return run
