"""Sizes of the pieces that the engine works in: it runs with them, and predictions reckon with them."""

from __future__ import annotations

from edgepeft.memory.target import DeviceKind
from edgepeft.models import sizes
from edgepeft.units import MIB

LOSS_SCRATCH_BYTES: dict[DeviceKind, int] = {"cpu": 4 * MIB, "cuda": 64 * MIB}
"""Float32 scratch of the cross-entropy: on the CPU it stays in the cache, on a card fewer launches count."""
ATTENTION_ROWS = 256
"""Query rows whose scores exist at one time in the block attention: bounds the workspace, and skips half of a long
triangle."""
ELEMENTWISE_CHUNK = 1 << 17
"""Entries that norms and activations work on at one time on the CPU, in float32: what one pass leaves in the cache, the
next one finds there."""
CPU_CHUNK = 1 << 20
"""Entries that are quantized or dequantized at one time on the CPU; a multiple of the NF4 block. It bounds the
transient memory of quantizing and keeps what is dequantized in the cache until it is copied."""
QUANTIZING_BYTES: dict[int, float] = {2: 13.5, 4: 9.5}
"""Transient bytes an entry of quantizing to 4 bit on the CPU, beside the result, by the bytes of a source entry;
measured with bitsandbytes 0.50."""
NF4_BLOCK = sizes.NF4_BLOCK
"""Consecutive entries that share one scale."""
ABSMAX_BLOCK = sizes.ABSMAX_BLOCK
"""Scales that share one second-level scale in double quantization."""
PREFILL_TOKENS = 512
"""Prompt tokens of a chat that go through the model at once; bounds memory, and a cancel waits no longer than one of
them."""
BATCH_PREFILL = 4
"""The same for many prompts together, as a multiple of `PREFILL_TOKENS`."""
