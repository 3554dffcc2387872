"""What a plan knows about the data: how long its samples are."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Protocol

from edgepeft.data.schedule import total_steps
from edgepeft.memory.workload import Workload
from edgepeft.methods import method_of
from edgepeft.plan.train_plan import DataSummary
from edgepeft.plan.workloads import (
    Counts,
    StepList,
    largest_held_out,
    largest_micro_batches,
    largest_step,
    with_leading,
    workloads_of,
)

if TYPE_CHECKING:
    import numpy as np

    from edgepeft.data.statistics import Bin
    from edgepeft.spec import Overlong, Recipe, RunSpec


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

    def trainable(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each sample, the tokens that go through the model and those whose successor is trained, [n] each.

        A sample that teaches nothing has 0 and 0.
        """
        ...

    def limited(self, max_seq_len: int, overlong: Overlong) -> SampleTable:
        """The table with longer samples truncated or dropped."""
        ...


class SampleLengths:
    """Lengths of the training and the held-out samples.

    A sample's length is what it has in the file; what goes through the model may be shorter, since nothing is computed
    behind the last trained token.

    Args:
        train: the training samples, untruncated.
        held_out: the held-out samples, untruncated.
        estimated: whether they were counted without the model's tokenizer.
    """

    def __init__(self, train: SampleTable, held_out: SampleTable, *, estimated: bool = False) -> None:
        import numpy as np

        self.estimated = estimated
        self._train = train
        self._held_out = held_out
        self._sorted: np.ndarray = np.sort(np.asarray(train.lengths, dtype=np.int64))
        computed, trained = train.trainable()
        self._computed: Counts = np.sort(np.asarray(computed, dtype=np.int64))
        self._trained: Counts = np.sort(np.asarray(trained, dtype=np.int64))
        self._held_out_computed: Counts = np.asarray(held_out.trainable()[0], dtype=np.int64)
        self._limited: dict[tuple[int, Overlong], tuple[SampleTable, SampleTable]] = {}
        self._exact: dict[tuple[object, ...], tuple[Workload, ...]] = {}
        self._counts: dict[tuple[int, Overlong, int], tuple[Counts, Counts, Counts, Counts]] = {}
        self._largest_step: dict[tuple[object, ...], int] = {}

    @property
    def samples(self) -> int:
        """Training samples."""
        return len(self._sorted)

    @property
    def longest(self) -> int:
        """Longest training sample in tokens."""
        return int(self._sorted[-1])

    def longest_computed(self, max_seq_len: int, leading_rows: int = 0) -> int:
        """Most rows of a sample, trained on or held out, that can go through the model under a length limit.

        Args:
            max_seq_len: the limit.
            leading_rows: that the method puts before each sample.
        """
        held_out = int(self._held_out_computed.max()) if len(self._held_out_computed) else 0
        return leading_rows + max(1, min(max_seq_len, max(int(self._computed[-1]), held_out)))

    def covering(self, share: float) -> int:
        """The smallest length that keeps this share of the training samples whole."""
        kept = max(1, math.ceil(share * self.samples - 1e-9))
        return int(self._sorted[kept - 1])

    def histogram(self) -> tuple[Bin, ...]:
        """Training samples by their length before truncation, in bars that double in width."""
        from edgepeft.data.statistics import summarize_lengths

        return summarize_lengths(Counter(self._sorted.tolist()), 0).histogram

    def whole(self, max_seq_len: int) -> int:
        """Training samples that are not longer than this."""
        return int(self._sorted.searchsorted(max_seq_len, side="right"))

    def bound(self, spec: RunSpec) -> Workload:
        """A workload that no micro-batch of the run exceeds, without a look at its steps."""
        recipe, cap = spec.recipe, spec.layout.micro_batch_tokens
        rows = leading_rows(recipe)
        most = with_leading(self._computed[-recipe.samples_per_step :].clip(max=recipe.max_seq_len), rows)
        step = int(most.sum())
        longest = max(1, int(most[-1]))
        tokens = max(min(cap, step), longest)
        held_out = with_leading(self._held_out_computed.clip(max=recipe.max_seq_len), rows)
        held_out_longest = int(held_out.max()) if len(held_out) else 0
        counts = counts_samples(recipe)
        held_out_tokens = max(min(cap, int(held_out.sum())), held_out_longest)
        return Workload(
            tokens=tokens,
            longest=longest,
            trained=min(tokens, max(1, int(self._trained[-recipe.samples_per_step :].sum()))),
            alone=step <= cap,
            held_out_tokens=held_out_tokens,
            held_out_longest=held_out_longest,
            held_out_trained=held_out_tokens,
            samples=min(len(most), tokens - longest + 1) if counts else 0,
            held_out_samples=min(len(held_out), held_out_tokens - held_out_longest + 1) if counts else 0,
        )

    def exact(self, spec: RunSpec) -> tuple[Workload, ...]:
        """The micro-batches that the run really makes, as far as no other one needs as much.

        Without a sample to train on it is `bound`.
        """
        recipe, cap, most = spec.recipe, spec.layout.micro_batch_tokens, spec.upkeep.eval_max_samples
        run = self.steps(recipe)
        if run is None:
            return (self.bound(spec),)
        counts = counts_samples(recipe)
        key = (*_key(recipe, run), cap, most, counts)
        if key not in self._exact:
            train = largest_micro_batches(run, cap, count_samples=counts)
            held_out = largest_held_out(*self.held_out(recipe), cap, most, count_samples=counts)
            self._exact[key] = workloads_of(train, held_out, count_samples=counts)
        return self._exact[key]

    def steps(self, recipe: Recipe) -> StepList | None:
        """The optimizer steps of a run; None when they have nothing to train on."""
        computed, trained, _, _ = self._within(recipe)
        if not computed.any():
            return None
        steps = total_steps(len(computed), recipe.samples_per_step, recipe.epochs, recipe.max_steps)
        return StepList(computed, trained, recipe.samples_per_step, steps, recipe.seed)

    def held_out(self, recipe: Recipe) -> tuple[Counts, Counts]:
        """Of each held-out sample, the tokens that go through the model and those whose successor is trained."""
        return self._within(recipe)[2:]

    def step_tokens(self, recipe: Recipe) -> int:
        """Tokens of the run's largest optimizer step."""
        run = self.steps(recipe)
        if run is None:
            return 1
        key = _key(recipe, run)
        if key not in self._largest_step:
            self._largest_step[key] = largest_step(run)
        return self._largest_step[key]

    def _tables(self, max_seq_len: int, overlong: Overlong) -> tuple[SampleTable, SampleTable]:
        key = (max_seq_len, overlong)
        if key not in self._limited:
            self._limited[key] = (
                self._train.limited(max_seq_len, overlong),
                self._held_out.limited(max_seq_len, overlong),
            )
        return self._limited[key]

    def _within(self, recipe: Recipe) -> tuple[Counts, Counts, Counts, Counts]:
        """Computed rows and trained tokens of the training samples and of the held-out ones, [n] each."""
        import numpy as np

        rows = leading_rows(recipe)
        key = (recipe.max_seq_len, recipe.overlong, rows)
        if key not in self._counts:
            train, held_out = self._tables(recipe.max_seq_len, recipe.overlong)
            pairs = (*train.trainable(), *held_out.trainable())
            computed, trained, *others = (np.asarray(counts, dtype=np.int64) for counts in pairs)
            self._counts[key] = (with_leading(computed, rows), trained, with_leading(others[0], rows), others[1])
        return self._counts[key]

    def summary(self, max_seq_len: int, overlong: Overlong) -> DataSummary:
        """What the plan says about the data under a length limit."""
        kept, held_out = self._tables(max_seq_len, overlong)
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
            estimated=self.estimated,
        )


def counts_samples(recipe: Recipe) -> bool:
    """Whether memory depends on how many samples a micro-batch has: where something stands before each."""
    return method_of(recipe.method).leading_tokens(recipe.method) > 0


def leading_rows(recipe: Recipe) -> int:
    """Rows that the method puts before each sample."""
    return method_of(recipe.method).leading_rows(recipe.method)


def _key(recipe: Recipe, run: StepList) -> tuple[object, ...]:
    """What decides a run's steps, over the same data."""
    rows = leading_rows(recipe)
    return (recipe.max_seq_len, recipe.overlong, run.samples_per_step, run.steps, run.seed, rows)
