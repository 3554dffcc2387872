"""What of a model the targets of a method stand for, told from the model's shape alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from edgepeft.errors import UsageError
from edgepeft.models.shape import LinearShape, ModelShape

Table = Literal["embedding", "head"]
"""What a model has beside its layers: the rows that ids look up, and the matrix that makes logits."""
TABLE_NAMES: Mapping[Table, tuple[str, ...]] = {
    "embedding": ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings"),
    "head": ("lm_head", "embed_out"),
}
"""What models call them; any of the names stands for the one that a model has."""


def table_of(target: str) -> Table | None:
    """Which table a target means by its last part; None where it means linears."""
    last = target.rsplit(".", 1)[-1]
    return next((table for table, names in TABLE_NAMES.items() if last in names), None)


def means(name: str, path: str) -> bool:
    """Whether a name stands for a module: its path, or the ending of that."""
    return path == name or path.endswith(f".{name}")


def matching(targets: Sequence[str], shape: ModelShape) -> tuple[LinearShape, ...]:
    """The linears of one decoder layer, in forward order, whose name or its ending is a target.

    `all-linear` stands for every linear of the layer.

    Raises:
        UsageError: a target matches no linear.
    """
    chosen: list[LinearShape] = []
    for target in targets:
        matches = [linear for linear in shape.adaptable if target == "all-linear" or means(target, linear.name)]
        if not matches:
            known = ", ".join(sorted({linear.name.rsplit(".", 1)[-1] for linear in shape.adaptable}))
            raise UsageError(
                f"target {target!r} matches no linear layer of this model", where="targets", hint=f"It has: {known}"
            )
        chosen += [linear for linear in matches if linear not in chosen]
    return tuple(linear for linear in shape.adaptable if linear in chosen)
