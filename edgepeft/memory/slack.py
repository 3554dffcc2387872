"""What the CUDA caching allocator holds from the driver beyond live tensors, by rule of thumb.

Freed blocks that nothing fits into, the ends of pages and segments, and rounding: shares of what lives, fitted to the
allocator's model (engine/simulate/allocator.py) over some two hundred dry runs of twelve families from tiny widths to
those of 70B models. There they miss what a process holds of a card by 1 % in the median, by 5 % at most with expandable
segments and by 9 % without. Not measured on a card.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgepeft.memory.breakdown import Category
from edgepeft.units import MIB

_STATES: tuple[Category, ...] = ("adapter weights", "gradients", "optimizer state")
_BASE: tuple[Category, ...] = ("frozen weights", "quantization constants", "embeddings and head")

CONSTANT_BYTES: dict[bool, int] = {True: 14 * MIB, False: 7 * MIB}
"""With expandable segments, and without: ends of the first pages."""
SHARES: dict[bool, dict[Category, float]] = {
    True: {
        "recomputed layer": 0.077,
        "logits and loss": 0.077,
        "saved activations": 0.025,
        **dict.fromkeys(_STATES, 0.05),
    },
    False: {
        "recomputed layer": 0.20,
        "logits and loss": 0.20,
        "saved activations": 0.045,
        **dict.fromkeys(_STATES, 0.18),
        **dict.fromkeys(_BASE, 0.03),
    },
}
"""Of what lives at the peak, by category. Layers that run again leave the most holes, matrices that stay the fewest."""


def slack_bytes(ledger: Mapping[Category, int], expandable_segments: bool) -> int:
    """Bytes beyond the tensors of `ledger`, whether the allocator grows its segments or not."""
    shares = SHARES[expandable_segments]
    return CONSTANT_BYTES[expandable_segments] + round(
        sum(shares.get(category, 0.0) * size for category, size in ledger.items())
    )
