"""IA³: learned factors for keys, values and the inside of the MLP, the smallest of all methods.

Liu et al. 2022, *Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning* (arXiv
2205.05638). Each entry of a targeted linear's result, or of the input of a feed-forward one, is multiplied by a factor
of its own. Factors start at 1, so training starts from the base.
"""

from __future__ import annotations

import msgspec

from edgepeft.errors import UsageError
from edgepeft.methods.targets import matching, means
from edgepeft.methods.terms import FLOAT32, LinearTerms, Method, Trained
from edgepeft.models.shape import LinearShape, ModelShape


class Ia3Config(msgspec.Struct, frozen=True, tag="ia3", forbid_unknown_fields=True):
    """What decides an IA³ adapter."""

    outputs: tuple[str, ...] = ("k_proj", "v_proj")
    """Linears whose results are multiplied: module names or their endings."""
    inputs: tuple[str, ...] = ("down_proj",)
    """Linears whose inputs are multiplied."""

    def __post_init__(self) -> None:
        if not self.outputs and not self.inputs:
            raise UsageError("no linear is named", where="outputs", hint="Usual are k_proj,v_proj and down_proj")
        if both := set(self.outputs) & set(self.inputs):
            raise UsageError(f"{min(both)} cannot be multiplied before and after", where="inputs", hint="Choose one")


class Ia3(Method):
    """See the module."""

    paper = "arXiv 2205.05638"
    peft_type = "IA3"
    adds = "factors for keys, values and the inside of the MLP"
    merges = True

    def targeted(self, config: Ia3Config, shape: ModelShape) -> tuple[LinearShape, ...]:
        """Those whose results are multiplied, and those whose inputs are.

        Raises:
            UsageError: a name matches no linear.
        """
        return matching((*config.outputs, *config.inputs), shape)

    def trained(self, config: Ia3Config, shape: ModelShape) -> Trained:
        """A factor for each entry."""
        inputs = self._inputs(config, shape)
        return Trained(
            tuple(
                linear.in_features if linear in inputs else linear.out_features
                for linear in self.targeted(config, shape)
            )
        )

    def linear_terms(
        self, config: Ia3Config, linear: LinearShape, tokens: int, compute_bytes: int, *, training: bool
    ) -> LinearTerms:
        """The result before it was multiplied is kept; an input is kept beside the one that was multiplied."""
        c = compute_bytes
        if any(means(name, linear.name) for name in config.inputs):
            size = linear.in_features
            return LinearTerms(
                parameters=size, keeps_input=False, backward_bytes=(c * tokens + FLOAT32) * size, rescales_input=True
            )
        size = linear.out_features
        return LinearTerms(
            parameters=size,
            kept_bytes=c * tokens * size,
            keeps_input=False,
            backward_bytes=(c * tokens + FLOAT32) * size,
            rescales_output=True,
        )

    def _inputs(self, config: Ia3Config, shape: ModelShape) -> tuple[LinearShape, ...]:
        return matching(config.inputs, shape) if config.inputs else ()
