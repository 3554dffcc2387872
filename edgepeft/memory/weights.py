"""Bytes of the frozen base, by how it is held."""

from __future__ import annotations

import math

from edgepeft.memory.breakdown import Category
from edgepeft.memory.chunks import ABSMAX_BLOCK, NF4_BLOCK
from edgepeft.models.shape import ModelShape
from edgepeft.spec import ComputeDtype, Precision

ELEMENT_BYTES: dict[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of one dense entry."""
NF4_MEAN_BYTES = 4
"""Per matrix: the mean that was subtracted from the scales before they were quantized, float32."""


def matrix_bytes(weights: int, rows: int, precision: Precision) -> tuple[int, int]:
    """Bytes of one frozen matrix: its weights, and the constants that quantization adds.

    Args:
        weights: entries of the matrix.
        rows: its out_features.
        precision: how it is held.
    """
    if precision == "nf4":
        blocks = math.ceil(weights / NF4_BLOCK)
        nested = math.ceil(blocks / ABSMAX_BLOCK)
        return math.ceil(weights / 2), blocks + 4 * nested + NF4_MEAN_BYTES
    if precision == "int8":
        return weights, 4 * rows
    return weights * ELEMENT_BYTES[precision], 0


def base_bytes(shape: ModelShape, precision: Precision, compute_dtype: ComputeDtype) -> dict[Category, int]:
    """Bytes of the whole base by category.

    Only the linear layers are held in `precision`; embedding, head, norms, biases and experts in the compute dtype.
    """
    dense = ELEMENT_BYTES[compute_dtype]
    weights = constants = 0
    for linear in shape.linears:
        packed, extra = matrix_bytes(linear.in_features * linear.out_features, linear.out_features, precision)
        weights += packed + (linear.out_features * dense if linear.bias else 0)
        constants += extra
    layer_dense = (shape.norm_parameters + shape.expert_parameters) * dense
    return {
        "frozen weights": shape.layers * (weights + layer_dense) + shape.final_norm_parameters * dense,
        "quantization constants": shape.layers * constants,
        "embeddings and head": shape.embedding_parameters * dense,
    }
