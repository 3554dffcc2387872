"""What a method adds to the memory of a training step, in its own words: per linear and per decoder layer."""

from __future__ import annotations

import msgspec


class LinearTerms(msgspec.Struct, frozen=True):
    """What an update adds to one linear, for one micro-batch."""

    parameters: int
    """Its trained entries; parameters, gradients and optimizer state are float32."""
    tensors: int
    """Among how many tensors they are."""
    kept_bytes: int = 0
    """Kept from forward to backward, beside the linear's input."""
    keeps_input: bool = True
    """Whether backward needs the linear's input."""
    forward_bytes: int = 0
    """The highest point of its forward, beside input, output and what is kept."""
    backward_bytes: int = 0
    """The highest point of its backward, beside input, both gradients and what was kept; fresh gradients included."""


class LayerTerms(msgspec.Struct, frozen=True):
    """What a method adds to a decoder layer outside of its linears, for one micro-batch."""

    parameters: int = 0
    """Its trained entries."""
    tensors: int = 0
    """Among how many tensors they are."""
    kept_bytes: int = 0
    """Kept from forward to backward."""
    forward_bytes: int = 0
    """The highest point of its forward, beside the residual stream and what is kept."""
    backward_bytes: int = 0
    """The highest point of its backward, beside the gradient of the residual stream and what was kept."""
