"""How large a model's weights are in each form that a base can be held in."""

from __future__ import annotations

from edgepeft.models.shape import ModelShape

NF4_BLOCK = 64
"""Consecutive entries that share one scale (Dettmers et al. 2023, arXiv 2305.14314, section 3)."""
ABSMAX_BLOCK = 256
"""Scales that share one second-level scale in double quantization."""
NF4_BITS = 4 + 8 / NF4_BLOCK + 32 / (NF4_BLOCK * ABSMAX_BLOCK)
"""Bits of one packed weight: 4, an 8-bit scale for each 64 weights, and a float32 scale for each 256 of those scales
(double quantization, Dettmers et al. 2023, arXiv 2305.14314)."""


def size_by_precision(shape: ModelShape) -> dict[str, int]:
    """Bytes of all weights as bf16, int8 and nf4.

    The two low-bit forms pack the linear layers of the decoder; embeddings, head, norms, biases and experts stay in
    16 bit. int8 keeps one float32 scale for each row.
    """
    packed = shape.layers * shape.linear_parameters_per_layer
    rest_bytes = 2 * (shape.parameters - packed)
    rows = shape.layers * sum(linear.out_features for linear in shape.linears)
    return {
        "bf16": 2 * shape.parameters,
        "int8": packed + 4 * rows + rest_bytes,
        "nf4": round(packed * NF4_BITS / 8) + rest_bytes,
    }
