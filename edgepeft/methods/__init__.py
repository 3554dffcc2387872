"""PEFT methods, the light half: configs, parameter counts and memory terms.

`MethodConfig` is the union that a recipe holds; each member is tagged with its id. The tensors of method NAME are in
`edgepeft/engine/methods/NAME.py`. What a method module of this folder offers is the `Method` protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from edgepeft.methods import lora
from edgepeft.methods.lora import LoraConfig
from edgepeft.methods.terms import LayerTerms, LinearTerms
from edgepeft.models.shape import LinearShape, ModelShape

MethodConfig = LoraConfig


class Method(Protocol):
    """What each module of this folder offers."""

    PAPER: str
    """Where the method was published."""
    PEFT_TYPE: str | None
    """Its name in PEFT's adapter_config.json; None where PEFT has no such method."""
    ADDS: str
    """What it adds to the model, in a few words."""
    MERGES: bool
    """Whether its update can be folded into the base weights."""

    def targeted(self, config: Any, shape: ModelShape) -> tuple[LinearShape, ...]:
        """The linears of one decoder layer that it changes."""
        ...

    def count_parameters(self, config: Any, shape: ModelShape) -> int:
        """Trainable entries of the whole model."""
        ...

    def linear_terms(
        self, config: Any, linear: LinearShape, tokens: int, compute_bytes: int, *, training: bool
    ) -> LinearTerms:
        """What it adds to a targeted linear, for a micro-batch.

        Args:
            config: of the method.
            linear: one of `targeted`.
            tokens: of the micro-batch.
            compute_bytes: of an entry in the compute dtype.
            training: whether there is dropout.
        """
        ...

    def shared_terms(
        self, config: Any, linears: Sequence[LinearShape], tokens: int, compute_bytes: int, *, training: bool
    ) -> LinearTerms | None:
        """What it adds to several targeted linears that read the same input and are updated together.

        None where each is updated by itself; then `linear_terms` holds for each.
        """
        ...

    def layer_terms(
        self, config: Any, shape: ModelShape, tokens: int, compute_bytes: int, *, training: bool
    ) -> LayerTerms:
        """What it adds to a decoder layer outside of its linears."""
        ...


METHODS: dict[str, Method] = {"lora": lora}
"""Every method by its id."""


def method_of(config: MethodConfig) -> Method:
    """The module that a config belongs to."""
    return METHODS[str(config.__struct_config__.tag)]


__all__ = ["METHODS", "LayerTerms", "LinearTerms", "LoraConfig", "Method", "MethodConfig", "method_of"]
