"""How decoder layers run in training: activation checkpointing, and saying in which layer the work is.

Checkpointing lets a layer keep nothing of its inside for backward and form it again: Chen et al. 2016, *Training Deep
Nets with Sublinear Memory Cost* (arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from edgepeft.engine.ledger import mark_place
from edgepeft.engine.model.linear import recomputing
from edgepeft.engine.training.offload import OffloadedInputs
from edgepeft.spec import Checkpointing


def set_checkpointing(layers: Sequence[nn.Module], mode: Checkpointing) -> None:
    """Switches all decoder layers to `mode`; it may be called again with another one at any time between steps.

    With `layer`, each layer keeps only its input and runs again in backward, under the same packing context; with
    `offload` that input lies in the host's RAM.
    """
    inputs = OffloadedInputs() if mode == "offload" else None
    for number, layer in enumerate(layers, 1):
        # An instance attribute hides the class's forward; removing it brings that one back.
        layer.__dict__.pop("forward", None)
        layer.__dict__["forward"] = _placed(layer.forward, number, mode, inputs)


def _placed(forward: Any, number: int, mode: Checkpointing, inputs: OffloadedInputs | None) -> Any:
    def begin_backward(gradient: Tensor) -> None:
        mark_place(f"backward of layer {number}")

    def run(*arguments: Any, **options: Any) -> Any:
        mark_place(f"forward of layer {number}")
        if mode != "none" and torch.is_grad_enabled():
            if not arguments:
                # Only what is given by its place is kept as a saved tensor.
                arguments = (options.pop("hidden_states"),)
            hooks = None if inputs is None else inputs.of_layer(number, arguments[0])
            # Dropout is a pure function of seed, step and sample: there is no generator whose state would matter.
            with hooks or nullcontext():
                out = checkpoint(
                    _told_when_again(forward),
                    *arguments,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    determinism_check="none",
                    **options,
                )
            if hooks is not None and inputs is not None:
                inputs.leave()
        else:
            out = forward(*arguments, **options)
        hidden = out[0] if isinstance(out, tuple) else out
        if hidden.requires_grad:
            hidden.register_hook(begin_backward)
        return out

    return run


def _told_when_again(forward: Any) -> Any:
    """Lets every call but the first run as a recomputation, whose result nobody uses."""
    called = False

    def run(*arguments: Any, **options: Any) -> Any:
        nonlocal called
        again, called = called, True
        with recomputing(again):
            return forward(*arguments, **options)

    return run
