"""Dropout whose mask is a pure function of (seed, step, sample id, module).

Which samples share a micro-batch, and how often a layer is recomputed, must not change what is learned. So the mask
of a sample is drawn from a generator of its own; the training loop says which samples a packed row holds.
Recomputation in backward runs the forward again: the context has to enclose the backward pass too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class PackedSamples:
    """The samples of one micro-batch, in the order in which their tokens lie in it."""

    def __init__(self, seed: int, step: int, sample_ids: Sequence[int], lengths: Sequence[int]) -> None:
        if len(sample_ids) != len(lengths):
            raise ValueError(f"{len(sample_ids)} sample ids but {len(lengths)} lengths")
        self.seed = seed
        self.step = step
        self.samples = tuple(zip(sample_ids, lengths, strict=True))
        self.tokens = sum(lengths)

    def mask(self, module: str, width: int, share: float, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[tokens, width] of 0 and 1 / (1 - share), so that the expected value stays the same."""
        kept = torch.empty(self.tokens, width, device=device, dtype=dtype)
        start = 0
        for sample_id, length in self.samples:
            generator = torch.Generator(device=device)
            generator.manual_seed(_seed_of(self.seed, self.step, sample_id, module))
            kept[start : start + length].bernoulli_(1 - share, generator=generator)
            start += length
        return kept.div_(1 - share)


# A plain global: backward on CUDA runs in another thread, which sees neither thread-locals nor context variables.
_current: PackedSamples | None = None


@contextmanager
def dropout_context(seed: int, step: int, sample_ids: Sequence[int], lengths: Sequence[int]) -> Iterator[None]:
    """Switches dropout on for a micro-batch of packed samples; outside of it nothing is dropped.

    It has to enclose forward *and* backward. `lengths` are the tokens of each sample, in the order of the packed rows.
    """
    global _current
    before = _current
    _current = PackedSamples(seed, step, sample_ids, lengths)
    try:
        yield
    finally:
        _current = before


def current_samples() -> PackedSamples | None:
    """The micro-batch being trained on; None outside of training."""
    return _current


def _seed_of(*parts: int | str) -> int:
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
