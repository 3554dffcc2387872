"""Which micro-batches a run will really make: the steps are a pure function of data and recipe, so they are counted.

The planner takes the largest of them for its prediction, and the engine's probe runs them first.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np

from edgepeft.data.packing import pack
from edgepeft.data.schedule import step_samples
from edgepeft.memory.workload import Workload

Counts = np.ndarray[tuple[int], np.dtype[np.int64]]

Size = tuple[int, int, int, bool, int]
"""Tokens, longest, trained and later of a micro-batch, and its samples where memory depends on their number."""
Where = TypeVar("Where")
EVALUATION = -1
PACKED_STEPS = 20_000
"""Steps that are packed one by one, in about half a second; the micro-batches of further ones are bounded."""


class MicroBatchSize(NamedTuple):
    """One micro-batch of a run, as far as memory depends on it."""

    tokens: int
    longest: int
    """Tokens of its longest sample."""
    trained: int
    """Its tokens whose successor carries loss."""
    later: bool
    """Whether its step has had another before: gradients of the whole adapter then exist already."""
    step: int
    """Step that it occurs in, counted from 0; -1 in an evaluation."""
    samples: tuple[int, ...]
    """Its samples, by their place in the table; empty where it is a bound that no micro-batch need reach."""


class StepList(NamedTuple):
    """The optimizer steps of a run."""

    tokens: Counts
    """Tokens of each training sample that go through the model, [n]; 0 where nothing is trained."""
    trained: Counts
    """Its tokens whose successor carries loss, [n]."""
    samples_per_step: int
    steps: int
    seed: int
    first: int = 0
    """Steps below it are done already, and left out."""

    def samples(self, step: int) -> list[int]:
        """The samples of a step that have something to train."""
        chosen = step_samples(len(self.tokens), self.samples_per_step, step, self.seed)
        return [index for index in chosen if self.tokens[index]]


def with_leading(tokens: Counts, rows: int) -> Counts:
    """The rows of each sample, [n], where so many stand before its tokens; a sample that teaches nothing has none."""
    return np.where(tokens > 0, tokens + rows, 0) if rows else tokens


def largest_micro_batches(run: StepList, cap: int, *, count_samples: bool = False) -> list[MicroBatchSize]:
    """The micro-batches of all steps that no other one covers, those with most tokens first.

    Args:
        run: the steps.
        cap: tokens of a micro-batch, as the layout says it.
        count_samples: whether memory depends on how many samples there are.
    """
    tokens, trained = run.tokens.tolist(), run.trained.tolist()
    seen: dict[Size, tuple[int, int]] = {}
    """Each size, and the step and group where it occurs first."""
    packed = 0
    for step in range(run.first, run.steps):
        chosen = [index for index in step_samples(len(tokens), run.samples_per_step, step, run.seed) if tokens[index]]
        if not chosen:
            continue
        lengths = [tokens[index] for index in chosen]
        carry = [trained[index] for index in chosen]
        total = sum(lengths)
        if total <= cap or len(chosen) == 1:
            samples = len(chosen) if count_samples else 0
            seen.setdefault((total, max(lengths), sum(carry), False, samples), (step, 0))
        elif packed < PACKED_STEPS:
            packed += 1
            for number, group in enumerate(pack(lengths, cap)):
                sizes = [lengths[place] for place in group]
                trained_rows, samples = sum([carry[place] for place in group]), len(group) if count_samples else 0
                size = (sum(sizes), max(sizes), trained_rows, number > 0, samples)
                seen.setdefault(size, (step, number))
        else:
            most = max(*lengths, min(cap, total))
            seen.setdefault((most, max(lengths), min(most, sum(carry)), True, 0), (step, -1))
    return [MicroBatchSize(*size[:4], step, _group(run, step, number, cap)) for size, (step, number) in uncovered(seen)]


def largest_step(run: StepList) -> int:
    """Tokens of the largest optimizer step, all its samples together."""
    return max((int(run.tokens[run.samples(step)].sum()) for step in range(run.steps)), default=0)


def largest_held_out(
    tokens: Counts, trained: Counts, cap: int, max_samples: int, *, count_samples: bool = False
) -> list[MicroBatchSize]:
    """The micro-batches of an evaluation that no other one covers: the first group of what is left, again and again.

    Args:
        tokens: of each held-out sample, [n]; 0 where nothing is trained.
        trained: its tokens whose successor carries loss, [n].
        cap: tokens of a micro-batch.
        max_samples: held-out samples that an evaluation reads at the most.
        count_samples: see `largest_micro_batches`.
    """
    left = [index for index in range(min(len(tokens), max_samples)) if tokens[index]]
    seen: dict[Size, tuple[int, ...]] = {}
    while left:
        group = tuple(left[place] for place in pack([int(tokens[index]) for index in left], cap)[0])
        sizes = [int(tokens[index]) for index in group]
        rows, samples = sum(int(trained[index]) for index in group), len(group) if count_samples else 0
        seen.setdefault((sum(sizes), max(sizes), rows, False, samples), group)
        left = [index for index in left if index not in group]
    return [MicroBatchSize(*size[:4], EVALUATION, group) for size, group in uncovered(seen)]


def uncovered(seen: dict[Size, Where]) -> list[tuple[Size, Where]]:
    """The sizes that no other one covers, those with most tokens first, and where they occur."""
    kept: list[tuple[Size, Where]] = []
    # Whatever covers a size comes before it in this order.
    for size in sorted(seen, reverse=True):
        if not any(all(more >= less for more, less in zip(other, size, strict=True)) for other, _ in kept):
            kept.append((size, seen[size]))
    return kept


def workloads_of(
    train: list[MicroBatchSize], held_out: list[MicroBatchSize], *, count_samples: bool = False
) -> tuple[Workload, ...]:
    """What predictions take: every one of `train` and of `held_out`, side by side in as few as hold them all.

    Args:
        train: micro-batches of steps.
        held_out: those of evaluations.
        count_samples: whether memory depends on how many samples there are.
    """
    made = []
    for number in range(max(len(train), len(held_out))):
        step = train[min(number, len(train) - 1)] if train else None
        evaluated = held_out[number] if number < len(held_out) else None
        made.append(
            Workload(
                tokens=step.tokens if step else 0,
                longest=step.longest if step else 0,
                trained=step.trained if step else 0,
                alone=step is not None and not step.later,
                held_out_tokens=evaluated.tokens if evaluated else 0,
                held_out_longest=evaluated.longest if evaluated else 0,
                held_out_trained=evaluated.trained if evaluated else 0,
                samples=len(step.samples) if step and count_samples else 0,
                held_out_samples=len(evaluated.samples) if evaluated and count_samples else 0,
            )
        )
    return tuple(made)


def _group(run: StepList, step: int, number: int, cap: int) -> tuple[int, ...]:
    """The samples of one micro-batch; empty for a bound."""
    if number < 0:
        return ()
    chosen = run.samples(step)
    groups = pack([int(run.tokens[index]) for index in chosen], cap)
    return tuple(chosen[place] for place in groups[number])
