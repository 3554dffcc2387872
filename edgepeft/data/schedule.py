"""Which samples form which optimizer step, as a pure function of the step number.

Nothing is stored between steps, so that resuming at step k needs no replay, and two processes agree without talking.
The order comes from a hash of (seed, epoch, sample), not from a library's shuffle, whose stream may change by version.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

Order = np.ndarray[tuple[int], np.dtype[np.int64]]

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 0xFFFFFFFFFFFFFFFF


def step_samples(samples: int, samples_per_step: int, step: int, seed: int) -> list[int]:
    """The samples of one optimizer step.

    Args:
        samples: how many there are.
        samples_per_step: how many one step takes; the last step of an epoch takes what is left.
        step: counted from 0 over all epochs.
        seed: chooses the order; each epoch has an order of its own.

    Returns:
        Distinct indices below `samples`. The steps of one epoch together hold each index exactly once.

    Raises:
        ValueError: a count is below 1 or the step is negative.
    """
    per_epoch = steps_per_epoch(samples, samples_per_step)
    if step < 0:
        raise ValueError(f"step must not be negative, not {step}")
    epoch, within = divmod(step, per_epoch)
    order = _epoch_order(samples, seed, epoch)
    return [int(index) for index in order[within * samples_per_step : (within + 1) * samples_per_step]]


def steps_per_epoch(samples: int, samples_per_step: int) -> int:
    """Optimizer steps of one pass, the last one ragged.

    Raises:
        ValueError: a count is below 1.
    """
    if samples < 1 or samples_per_step < 1:
        raise ValueError(f"samples and samples_per_step must be at least 1, not {samples} and {samples_per_step}")
    return -(-samples // samples_per_step)


def total_steps(samples: int, samples_per_step: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of a whole run: at least 1, at most `max_steps`.

    A part of an epoch counts the steps that its share of the samples needs.

    Raises:
        ValueError: a count is below 1, or `epochs` is not above 0.
    """
    per_epoch = steps_per_epoch(samples, samples_per_step)
    if not epochs > 0 or not math.isfinite(epochs):
        raise ValueError(f"epochs must be above 0, not {epochs}")
    whole = int(epochs)
    # 0.1 * 30 is 3.0000000000000004: rounding keeps that from costing a step.
    part = math.ceil(round((epochs - whole) * samples, 6) / samples_per_step)
    steps = max(1, whole * per_epoch + min(part, per_epoch))
    return steps if max_steps is None else max(1, min(steps, max_steps))


def split_held_out(samples: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and indices held out, both ascending.

    A fraction above 0 holds out at least one sample of two or more, and always leaves one to train on.

    Raises:
        ValueError: the fraction is outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the held-out fraction must be in [0, 1), not {fraction}")
    count = min(max(1, round(samples * fraction)), samples - 1) if fraction > 0 and samples > 1 else 0
    order = _order(samples, seed, -1)
    return sorted(order[count:].tolist()), sorted(order[:count].tolist())


@lru_cache(maxsize=4)
def _epoch_order(samples: int, seed: int, epoch: int) -> Order:
    return _order(samples, seed, epoch)


def _order(samples: int, seed: int, epoch: int) -> Order:
    """The indices below `samples`, sorted by SplitMix64 (Steele et al. 2014) of seed, epoch and index."""
    key = _mix_one(_mix_one(seed & _WORD) ^ (epoch & _WORD))
    words = np.arange(samples, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return np.argsort(words, kind="stable")


def _mix_one(word: int) -> int:
    word = (word + _GOLDEN) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)
