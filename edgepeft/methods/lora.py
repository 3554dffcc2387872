"""LoRA: a low-rank update beside each frozen linear layer.

Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models* (arXiv 2106.09685). A linear layer `x Wᵀ` becomes
`x Wᵀ + s (x Aᵀ) Bᵀ` with A of shape [rank, in], B of shape [out, rank] and s = alpha / rank, or alpha / √rank with
rank-stabilised scaling (Kalajdzievski 2023, arXiv 2312.03732). B starts at zero, so training starts from the base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from edgepeft.errors import UsageError
from edgepeft.methods.targets import matching
from edgepeft.methods.terms import FLOAT32, LinearTerms, Method, Trained
from edgepeft.models.shape import LinearShape, ModelShape


class LoraConfig(msgspec.Struct, frozen=True, tag="lora", forbid_unknown_fields=True):
    """What decides a LoRA adapter."""

    rank: int = 16
    """Inner dimension r of the update; memory grows linearly with it, quality flattens early."""
    alpha: float = 32.0
    """The update is scaled by alpha / r."""
    targets: tuple[str, ...] = ("all-linear",)
    """Module names (or their endings) that get an update; `all-linear` stands for every linear of every layer."""
    dropout: float = 0.0
    """Share of the update's input entries that are zeroed in training."""
    rank_stabilised: bool = False
    """Scale by alpha / √r instead of alpha / r."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"a LoRA rank of {self.rank} is not possible", where="rank", hint="Use 4 to 128")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"a dropout of {self.dropout} is not possible", where="dropout", hint="Use 0 to 0.5")
        if not math.isfinite(self.alpha) or self.alpha == 0:
            raise UsageError(f"an alpha of {self.alpha} is not possible", where="alpha", hint="Twice the rank is usual")
        if not self.targets:
            raise UsageError("no target module is named", where="targets", hint="Use all-linear for every linear layer")

    @property
    def scale(self) -> float:
        """The factor s of the update."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


class Lora(Method):
    """See the module."""

    paper = "arXiv 2106.09685"
    peft_type = "LORA"
    adds = "a low-rank product beside each linear layer"
    merges = True

    def targeted(self, config: LoraConfig, shape: ModelShape) -> tuple[LinearShape, ...]:
        """The linears of one decoder layer that get an update.

        Raises:
            UsageError: a target matches no linear, or the rank exceeds a targeted dimension.
        """
        chosen = matching(config.targets, shape)
        smallest = min(min(linear.in_features, linear.out_features) for linear in chosen)
        if config.rank > smallest:
            raise UsageError(
                f"rank {config.rank} exceeds the smallest targeted dimension {smallest}",
                where="rank",
                hint=f"Use at most {smallest}",
            )
        return chosen

    def trained(self, config: LoraConfig, shape: ModelShape) -> Trained:
        """A, of r · in entries, and B, of r · out, for each targeted linear."""
        return Trained(
            tuple(
                config.rank * features
                for linear in self.targeted(config, shape)
                for features in (linear.in_features, linear.out_features)
            )
        )

    def linear_terms(
        self, config: LoraConfig, linear: LinearShape, tokens: int, compute_bytes: int, *, training: bool
    ) -> LinearTerms:
        """x Aᵀ is kept; A, B and their fresh gradients exist in the compute dtype while they are multiplied."""
        rank, c = config.rank, compute_bytes
        a, b = rank * linear.in_features, rank * linear.out_features
        inner = c * tokens * rank
        # Where products run in float32, neither parameters nor gradients are copied.
        low, high = (0, FLOAT32) if c == FLOAT32 else (c, c + FLOAT32)
        mask = c * tokens * linear.in_features if training and config.dropout else 0
        # Forward: the mask and the masked input, of which the latter stays.
        forward = max(2 * mask - inner, mask + low * max(a, b))
        # Backward: g B; the mask and the part of the input's gradient; the masked input and the fresh gradients.
        backward = inner + max(low * b, 2 * mask + max(low * a, high * b, FLOAT32 * b + high * a))
        return LinearTerms(parameters=a + b, kept_bytes=inner, forward_bytes=forward, backward_bytes=backward)

    def shared_terms(
        self, config: LoraConfig, linears: Sequence[LinearShape], tokens: int, compute_bytes: int, *, training: bool
    ) -> LinearTerms | None:
        """All A are put above each other, and so are all fresh dA, while they are multiplied; not with dropout."""
        if training and config.dropout:
            return None
        rank, c = config.rank, compute_bytes
        a, b = (rank * sum(sizes) for sizes in zip(*((x.in_features, x.out_features) for x in linears), strict=True))
        widest, last = rank * max(linear.out_features for linear in linears), rank * linears[-1].out_features
        inner = c * tokens * rank * len(linears)
        low = 0 if c == FLOAT32 else c
        # Forward: all A in the compute dtype and stacked, before x Aᵀ is there; then each B.
        forward = max((low + c) * a - inner, c * a, low * widest)
        # Backward: g B of one linear beside the place for all; A again; every dA and dB, the last dB as it was formed.
        fresh = (c + FLOAT32) * a + FLOAT32 * b + low * last
        backward = inner + max(low * widest + c * tokens * rank, (low + c) * a, fresh)
        return LinearTerms(
            parameters=a + b,
            kept_bytes=inner,
            forward_bytes=forward,
            backward_bytes=backward,
        )
