"""Sparse fine-tuning: single entries of the frozen matrices are trained, some hundredth of them.

Ansell et al. 2022, *Composable Sparse Fine-Tuning for Cross-Lingual Transfer* (arXiv 2110.07560); Bhardwaj et al. 2024,
*Sparse High Rank Adapters* (arXiv 2406.13175). `W + S` with S zero but for chosen entries, which never change; their
values start at zero. Kept are values and places, 4 bytes each, whatever the base is held in: S is added to the matrix
when that is dequantized for a product. Unlike a low-rank product, the change has full rank.

Which entries: those with the largest gradients on the first samples, summed up by magnitude, before any step; those of
the largest magnitude; or some by chance.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from edgepeft.errors import UsageError
from edgepeft.methods.targets import matching
from edgepeft.methods.terms import FLOAT32, LinearTerms, Method, Trained
from edgepeft.models.shape import LinearShape, ModelShape

Choice = Literal["gradient", "magnitude", "random"]
INDEX = 4
"""Bytes of the place of an entry."""
GRADIENT_BLOCK = 1 << 22
"""Entries of a matrix whose gradients are formed at one time."""
_MOST_ENTRIES = (1 << 31) - 1


class SparseConfig(msgspec.Struct, frozen=True, tag="sparse", forbid_unknown_fields=True):
    """What decides a sparse adapter."""

    density: float = 0.01
    """Share of the entries of each targeted matrix that is trained."""
    rank: int = 0
    """As many entries as LoRA of this rank trains, r (in + out) of a matrix, which is how PEFT's SHiRA counts: only
    such adapters load there. 0 takes `density`."""
    choose: Choice = "gradient"
    """By what entries are chosen: gradient, magnitude or random."""
    targets: tuple[str, ...] = ("all-linear",)
    """Module names or their endings; `all-linear` stands for every linear of every layer."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.density) or not 0 < self.density <= 1:
            hint = "Give a share above 0 and up to 1; 0.005 to 0.05 are usual"
            raise UsageError(f"a density of {self.density:g} is not possible", where="density", hint=hint)
        if self.rank < 0:
            raise UsageError(f"a rank of {self.rank} is not possible", where="rank", hint="Use 4 to 64, or 0")
        if not self.targets:
            raise UsageError("no target module is named", where="targets", hint="Use all-linear for every linear layer")

    def entries_of(self, module: str, out_features: int, in_features: int) -> int:
        """Trained entries of a matrix.

        Raises:
            UsageError: it has fewer, or more than places can be told of.
        """
        whole = out_features * in_features
        if whole > _MOST_ENTRIES:
            raise UsageError(f"{module} has {whole:,} entries, more than can be told apart", where="targets")
        count = self.rank * (in_features + out_features) or max(1, round(self.density * whole))
        if count > whole:
            raise UsageError(
                f"rank {self.rank} stands for {count:,} entries, and {module} has {whole:,}",
                where="rank",
                hint=f"Use at most {whole // (in_features + out_features)}",
            )
        return count


class Sparse(Method):
    """See the module."""

    paper = "arXiv 2406.13175"
    peft_type = "SHIRA"
    adds = "trained values in single places of the frozen matrices"
    merges = True

    def targeted(self, config: SparseConfig, shape: ModelShape) -> tuple[LinearShape, ...]:
        """The linears of one decoder layer with trained entries.

        Raises:
            UsageError: a target matches no linear, or a matrix has too few entries.
        """
        chosen = matching(config.targets, shape)
        for linear in chosen:
            config.entries_of(linear.name, linear.out_features, linear.in_features)
        return chosen

    def trained(self, config: SparseConfig, shape: ModelShape) -> Trained:
        """The values of each matrix."""
        return Trained(tuple(_entries(config, linear) for linear in self.targeted(config, shape)))

    def held_bytes(self, config: SparseConfig, shape: ModelShape) -> int:
        """The place of each value."""
        return shape.layers * sum(INDEX * _entries(config, linear) for linear in self.targeted(config, shape))

    def saving_bytes(self, config: SparseConfig, shape: ModelShape) -> int:
        """Places; in PEFT's form as rows and columns, which are made for the file."""
        return (4 if config.rank else 1) * self.held_bytes(config, shape)

    def forms_matrices(self, config: SparseConfig) -> bool:
        """Values are added to a copy."""
        return True

    def linear_terms(
        self, config: SparseConfig, linear: LinearShape, tokens: int, compute_bytes: int, *, training: bool
    ) -> LinearTerms:
        """Values in the compute dtype while they are added; the gradients of some rows, and of the values in them."""
        c, count = compute_bytes, _entries(config, linear)
        rows = block_rows(linear.out_features, linear.in_features)
        inside = count * rows // linear.out_features
        return LinearTerms(
            parameters=count,
            backward_bytes=FLOAT32 * count + c * rows * linear.in_features + (INDEX + c) * inside,
            adding_bytes=0 if c == FLOAT32 else c * count,
        )


def block_rows(out_features: int, in_features: int) -> int:
    """Rows of a matrix whose gradients are formed at one time."""
    return min(out_features, max(1, GRADIENT_BLOCK // in_features))


def _entries(config: SparseConfig, linear: LinearShape) -> int:
    return config.entries_of(linear.name, linear.out_features, linear.in_features)
