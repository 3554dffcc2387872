"""Full fine-tuning: every weight of the model is trained; what adapters are compared with.

A float32 copy of every parameter takes the place of the frozen one: matrices and biases of the linears, gains of norms,
the embedding and the output head. Products run in the compute dtype (Micikevicius et al. 2018, *Mixed Precision
Training*, arXiv 1710.03740). The base stays in memory beside them, so that it comes back to the bit when the copies are
switched off. Weights, gradients and AdamW's moments together take 16 bytes a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from edgepeft.errors import UsageError
from edgepeft.methods.terms import FLOAT32, LinearTerms, Method, Trained
from edgepeft.models.shape import LinearShape, ModelShape

QUANTIZED: Mapping[str, int] = {"nf4": 4, "int8": 8}
"""Precisions of a base that cannot be trained as a whole, and their bits."""


def cannot_train(precision: str) -> str:
    """Why a base in one of `QUANTIZED` is refused."""
    return f"{'an' if precision == 'int8' else 'a'} {QUANTIZED[precision]}-bit base cannot be trained as a whole"


class FullConfig(msgspec.Struct, frozen=True, tag="full", forbid_unknown_fields=True):
    """Nothing is left to decide."""


class Full(Method):
    """See the module."""

    paper = "arXiv 1710.03740"
    adds = "a trained copy of every weight in place of it"
    merges = True
    rate = 0.1
    needs_dense_base = True

    def targeted(self, config: FullConfig, shape: ModelShape) -> tuple[LinearShape, ...]:
        """All of them.

        Raises:
            UsageError: the model has experts.
        """
        if shape.experts:
            raise UsageError(
                "a mixture of experts cannot be trained as a whole", where="--method", hint="Use --method lora"
            )
        return shape.linears

    def trained(self, config: FullConfig, shape: ModelShape) -> Trained:
        """Everything that the model has."""
        linears = self.targeted(config, shape)
        matrices = tuple(linear.in_features * linear.out_features for linear in linears)
        biases = tuple(linear.out_features for linear in linears if linear.bias)
        whole, rest = divmod(shape.norm_parameters, shape.hidden)
        gains = (*(whole * (shape.hidden,)), *((rest,) if rest else ()))
        tables = (1 if shape.tied_embeddings else 2) * (shape.vocab * shape.hidden,)
        return Trained((*matrices, *biases, *gains), (shape.final_norm_parameters, *tables))

    def linear_terms(
        self, config: FullConfig, linear: LinearShape, tokens: int, compute_bytes: int, *, training: bool
    ) -> LinearTerms:
        """The matrix's gradient is formed in the compute dtype, then kept in float32."""
        matrix = linear.in_features * linear.out_features
        # Where products run in float32, the gradient is not copied.
        formed = 0 if compute_bytes == FLOAT32 else compute_bytes
        return LinearTerms(parameters=linear.parameters, backward_bytes=(formed + FLOAT32) * matrix)

    def trains_gains(self, config: Any) -> bool:
        """All of them."""
        return True

    def trains_tables(self, config: Any) -> bool:
        """Both of them."""
        return True
