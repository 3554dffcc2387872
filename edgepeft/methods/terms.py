"""What the light side knows of a PEFT method, and in which words a method tells what it adds to a training step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import msgspec

from edgepeft.models.shape import LinearShape, ModelShape

FLOAT32 = 4
"""Bytes of an entry of what is trained."""

Branch = Literal["attention", "mlp"]
"""The two parts of a decoder layer whose results meet the residual stream."""


class Trained(msgspec.Struct, frozen=True):
    """The tensors that a method trains, by their numbers of entries."""

    of_layer: tuple[int, ...] = ()
    """Those that every decoder layer has."""
    others: tuple[int, ...] = ()
    """Those of the whole model."""

    def parameters(self, layers: int) -> int:
        """Entries of all of them in a model of so many layers."""
        return layers * sum(self.of_layer) + sum(self.others)

    def sizes(self, layers: int) -> list[int]:
        """Entries of each tensor of the whole model."""
        return [*(layers * self.of_layer), *self.others]


class LinearTerms(msgspec.Struct, frozen=True):
    """What an update adds to one linear, for one micro-batch."""

    parameters: int
    """Its trained entries; parameters, gradients and optimizer state are float32."""
    kept_bytes: int = 0
    """Kept from forward to backward, beside the linear's input."""
    keeps_input: bool = True
    """Whether backward needs the linear's input."""
    forward_bytes: int = 0
    """The highest point of its forward, beside input, output and what is kept."""
    backward_bytes: int = 0
    """The highest point of its backward, beside input, both gradients and what was kept; fresh gradients included."""
    rescales_output: bool = False
    """Whether it multiplies what the linear gives, so that the frozen product sees another gradient."""
    rescales_input: bool = False
    """Whether it multiplies the linear's input, which is then made anew and kept beside the first one."""
    adding_bytes: int = 0
    """What adding it to the frozen matrix needs, whenever that is formed, beside the buffer of that."""
    first_bytes: int = 0
    """The highest point of what it does once after its tensors have changed, before the rest of its forward."""
    first_forming_bytes: int | None = None
    """Held while that forms the frozen matrix; None where it does not."""
    forming_forward_bytes: int | None = None
    """Held while its forward forms the frozen matrix once more, beside input, output and what is kept; None where it
    does not."""
    forming_backward_bytes: int | None = None
    """The same for its backward."""


class BranchTerms(msgspec.Struct, frozen=True):
    """What a method puts behind attention or MLP, for one micro-batch."""

    parameters: int
    """Its trained entries."""
    reads: Literal["input", "output"]
    """What it looks at, and keeps for backward: the branch's input or its result."""
    kept_bytes: int = 0
    """Kept beside that."""
    forward_bytes: int = 0
    """The highest point of its forward, beside the branch's result, its own, and what is kept."""
    backward_bytes: int = 0
    """The highest point of its backward before it forms the gradient of what it read, fresh gradients included."""
    gradient_bytes: int = 0
    """Held beside its fresh gradients while it forms that."""


class PrefixTerms(msgspec.Struct, frozen=True):
    """Keys and values that a method puts before every sample in each layer."""

    tokens: int
    """Of them."""
    entries: int
    """Of all keys of one layer; values alike."""
    parameters: int
    """Trained entries of one layer."""
    shared: int = 0
    """Trained entries of all layers together that each layer uses."""
    width: int = 0
    """Of the network that makes them; 0 where they are trained as they are."""


class TableTerms(msgspec.Struct, frozen=True):
    """What a method adds to the embedding and to the output head."""

    embedding_rank: int = 0
    """Of the product beside the embedding, whose narrower factor is as long as the vocabulary; 0 where there is
    none."""
    head_rank: int = 0
    """Of the product beside the output head; 0 where there is none."""
    drops: bool = False
    """Whether entries of what that is given are dropped in training."""


class Method(ABC):
    """A PEFT method without its tensors; each module of this folder has one subclass of it."""

    paper: ClassVar[str]
    """Where it was published."""
    peft_type: ClassVar[str | None] = None
    """Its name in PEFT's adapter_config.json; None where PEFT has no such method."""
    adds: ClassVar[str]
    """What it adds to the model, in a few words."""
    merges: ClassVar[bool]
    """Whether its update can become part of the base's weights; `adapters merge` then does that."""
    rate: ClassVar[float] = 1.0
    """Its usual learning rate over LoRA's."""
    ranked: ClassVar[bool] = False
    """Whether memory decides the rank of its low-rank products, and LoRA+ the learning rate of one of their factors."""
    needs_dense_base: ClassVar[bool] = False
    """Whether it replaces the base's matrices, so that these must not be quantized."""

    def __init__(self, config_type: type[msgspec.Struct]) -> None:
        self.config_type = config_type
        """What its configs are."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of its settings."""
        return self.config_type.__struct_fields__

    def targeted(self, config: Any, shape: ModelShape) -> tuple[LinearShape, ...]:
        """The linears of one decoder layer that it changes.

        Raises:
            UsageError: the config does not suit the model.
        """
        return ()

    @abstractmethod
    def trained(self, config: Any, shape: ModelShape) -> Trained:
        """The tensors that it trains.

        Raises:
            UsageError: the config does not suit the model.
        """

    def held_bytes(self, config: Any, shape: ModelShape) -> int:
        """What its adapter holds beside what it trains."""
        return 0

    def saving_bytes(self, config: Any, shape: ModelShape) -> int:
        """What writing its file needs beside the bytes of what it trains."""
        return 0

    def relative_work(self, config: Any) -> float:
        """Time of a step over that of its products alone, which are counted elsewhere."""
        return 1.0

    def forms_matrices(self, config: Any) -> bool:
        """Whether it changes the frozen matrices of its linears, so that these are formed whatever they are held in."""
        return False

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

        Raises:
            AssertionError: the method changes no linear.
        """
        raise AssertionError(f"{type(self).__name__} changes no linear")

    def shared_terms(
        self, config: Any, linears: Sequence[LinearShape], tokens: int, compute_bytes: int, *, training: bool
    ) -> LinearTerms | None:
        """What it adds to several targeted linears that read the same input and are updated together.

        None where each is updated by itself; then `linear_terms` holds for each.
        """
        return None

    def branch_terms(
        self, config: Any, shape: ModelShape, branch: Branch, tokens: int, compute_bytes: int
    ) -> BranchTerms | None:
        """What it puts behind a branch of every layer; None where it is nothing."""
        return None

    def trains_gains(self, config: Any) -> bool:
        """Whether it trains the gains of norms."""
        return False

    def leading_tokens(self, config: Any) -> int:
        """Places of the context that it takes before every sample."""
        return 0

    def leading_rows(self, config: Any) -> int:
        """Those of its places whose rows go through the model, as tokens do."""
        return 0

    def prefix_terms(self, config: Any, shape: ModelShape) -> PrefixTerms | None:
        """What it puts before the keys and values of every sample; None where it is nothing."""
        return None

    def continued(self, config: Any) -> Any:
        """The config of an adapter that goes on from the file of one with this config."""
        return config

    def table_terms(self, config: Any) -> TableTerms:
        """What it adds to the embedding and the output head, beside the base's own."""
        return TableTerms()

    def trains_tables(self, config: Any) -> bool:
        """Whether it trains the embedding and the output head, in place of the base's."""
        return False
