"""Bias tuning: the biases of linear layers are trained, everything else is frozen.

Ben Zaken et al. 2022, *BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models*
(arXiv 2106.10199). Trained is what is added to each bias; it starts at zero. Many decoders have biases on queries, keys
and values alone (Qwen 2), most have none: those cannot be trained this way.
"""

from __future__ import annotations

import msgspec

from edgepeft.errors import UsageError
from edgepeft.methods.targets import matching
from edgepeft.methods.terms import FLOAT32, LinearTerms, Method, Trained
from edgepeft.models.shape import LinearShape, ModelShape


class BiasConfig(msgspec.Struct, frozen=True, tag="bias", forbid_unknown_fields=True):
    """What decides bias tuning."""

    targets: tuple[str, ...] = ("all",)
    """Linears whose biases are trained: module names or their endings; `all` stands for every linear that has one."""

    def __post_init__(self) -> None:
        if not self.targets:
            raise UsageError("no linear is named", where="targets", hint="Use all for every bias")


def no_bias(targets: tuple[str, ...], known: set[str]) -> UsageError:
    """The error for targets without a bias.

    Args:
        targets: that have none.
        known: linears of the model that have one, by the last part of their names.
    """
    if not known:
        return UsageError(
            "this model's linear layers have no biases that could be trained",
            where="method",
            hint="Use --method norm to train as little, or lora",
        )
    return UsageError(
        f"{', '.join(targets)} has no bias", where="targets", hint=f"Biases have: {', '.join(sorted(known))}"
    )


class Bias(Method):
    """See the module."""

    paper = "arXiv 2106.10199"
    peft_type = "BEFT"
    adds = "trained offsets to the biases of linear layers"
    merges = True

    def targeted(self, config: BiasConfig, shape: ModelShape) -> tuple[LinearShape, ...]:
        """Those with a bias.

        Raises:
            UsageError: the model has no biases, or a name matches no linear that has one.
        """
        found = tuple(linear for linear in shape.adaptable if linear.bias)
        if config.targets == ("all",) and found:
            return found
        chosen = matching(config.targets, shape) if found else ()
        without = tuple(linear.name.rsplit(".", 1)[-1] for linear in chosen if not linear.bias)
        if without or not found:
            raise no_bias(without, {linear.name.rsplit(".", 1)[-1] for linear in found})
        return chosen

    def trained(self, config: BiasConfig, shape: ModelShape) -> Trained:
        """An offset for each row."""
        return Trained(tuple(linear.out_features for linear in self.targeted(config, shape)))

    def linear_terms(
        self, config: BiasConfig, linear: LinearShape, tokens: int, compute_bytes: int, *, training: bool
    ) -> LinearTerms:
        """Nothing is kept: the gradient is the sum of what comes back."""
        c, rows = compute_bytes, linear.out_features
        low = 0 if c == FLOAT32 else c
        return LinearTerms(
            parameters=rows, keeps_input=False, forward_bytes=low * rows, backward_bytes=(low + FLOAT32) * rows
        )
