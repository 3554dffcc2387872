"""What a plan knows about the data: how long its samples are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from edgepeft.plan.train_plan import DataSummary

if TYPE_CHECKING:
    import numpy as np

    from edgepeft.spec import Overlong


class SampleTable(Protocol):
    """The part of a token table that planning reads."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, [n]."""
        ...

    @property
    def trained(self) -> np.ndarray:
        """Tokens of each sample that carry loss, [n]."""
        ...

    def limited(self, max_seq_len: int, overlong: Overlong) -> SampleTable:
        """The table with longer samples truncated or dropped."""
        ...


class SampleLengths:
    """Lengths of the training and the held-out samples.

    Args:
        train: the training samples, untruncated.
        held_out: the held-out samples, untruncated.
    """

    def __init__(self, train: SampleTable, held_out: SampleTable) -> None:
        import numpy as np

        self._train = train
        self._held_out = held_out
        self._sorted: np.ndarray = np.sort(np.asarray(train.lengths, dtype=np.int64))

    @property
    def samples(self) -> int:
        """Training samples."""
        return len(self._sorted)

    @property
    def longest(self) -> int:
        """Longest training sample in tokens."""
        return int(self._sorted[-1])

    @property
    def longest_held_out(self) -> int:
        """Longest held-out sample in tokens; 0 when none is held out."""
        lengths = self._held_out.lengths
        return int(lengths.max()) if len(lengths) else 0

    def covering(self, share: float) -> int:
        """The smallest length that keeps this share of the training samples whole."""
        kept = max(1, math.ceil(share * self.samples - 1e-9))
        return int(self._sorted[kept - 1])

    def whole(self, max_seq_len: int) -> int:
        """Training samples that are not longer than this."""
        return int(self._sorted.searchsorted(max_seq_len, side="right"))

    def step_tokens(self, samples_per_step: int, max_seq_len: int) -> int:
        """Tokens of the largest optimizer step that can occur: the longest samples together."""
        return int(self._sorted[-samples_per_step:].clip(max=max_seq_len).sum())

    def summary(self, max_seq_len: int, overlong: Overlong) -> DataSummary:
        """What the plan says about the data under a length limit."""
        kept = self._train.limited(max_seq_len, overlong)
        held_out = self._held_out.limited(max_seq_len, overlong)
        return DataSummary(
            samples=self.samples + len(self._held_out.lengths),
            train_samples=len(kept.lengths),
            eval_samples=len(held_out.lengths),
            tokens=int(kept.lengths.clip(max=max_seq_len).sum()),
            trained_tokens=int(kept.trained.sum()),
            length_p50=self.covering(0.5),
            length_p99=self.covering(0.99),
            length_max=self.longest,
            overlong=self.samples - self.whole(max_seq_len),
        )
