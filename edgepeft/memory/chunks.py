"""Sizes of the pieces that the engine works in: it runs with them, and predictions reckon with them."""

from __future__ import annotations

from edgepeft.memory.target import DeviceKind
from edgepeft.models import sizes
from edgepeft.units import MIB

LOSS_SCRATCH_BYTES: dict[DeviceKind, int] = {"cpu": 4 * MIB, "cuda": 64 * MIB}
"""Float32 scratch of the cross-entropy: on the CPU it stays in the cache, on a card fewer launches count."""
TABLE_ROWS = 8192
"""Rows of the output head's gradient that are formed at one time, where it is trained: in 16 bit they are a tensor of
their own before they are added up in float32."""
ATTENTION_ROWS = 256
"""Query rows whose scores exist at one time in the block attention: bounds the workspace, and skips half of a long
triangle."""
TOKEN_STEP = 64
"""Packed rows, and the rows that meet the head, are filled up to a multiple of this. oneDNN keeps a quarter of a
megabyte for every shape that a product ever had, for good: with rows of any length a run over a million samples would
grow by gigabytes. Blocks of few sizes leave an allocator fewer holes, and a card's matrix units no edges."""
ATTENTION_STEP = 32
"""Rows and keys of such a block are computed in multiples of this. A softmax over 16-bit rows that end in the middle of
a vector takes two to five times as long on the CPU, and fewer shapes are fewer compiled products."""
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


def in_token_steps(count: int) -> int:
    """`count` rounded up to a multiple of `TOKEN_STEP`."""
    return -(-count // TOKEN_STEP) * TOKEN_STEP


def loss_rows(trained: int, chunk_rows: int) -> int:
    """Rows that meet the head, the last chunk filled up.

    Args:
        trained: tokens whose successor carries loss.
        chunk_rows: rows of a chunk.
    """
    rest = trained % chunk_rows
    return trained - rest + min(in_token_steps(rest), chunk_rows)


def in_attention_steps(count: int) -> int:
    """`count` rounded up to a multiple of `ATTENTION_STEP`."""
    return -(-count // ATTENTION_STEP) * ATTENTION_STEP
