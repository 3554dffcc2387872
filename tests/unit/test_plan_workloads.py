"""Which micro-batches a run makes: every one is covered by those that are counted, and those do occur."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edgepeft.data.packing import pack
from edgepeft.data.schedule import step_samples
from edgepeft.memory.workload import Workload
from edgepeft.plan import workloads
from edgepeft.plan.workloads import StepList, largest_held_out, largest_micro_batches, workloads_of

SAMPLES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60)), min_size=1, max_size=40)


def step_list(samples, *, per_step=4, steps=7, seed=0) -> StepList:
    tokens = np.array([longest for longest, _ in samples], np.int64)
    trained = np.array([min(longest, wanted) for longest, wanted in samples], np.int64)
    return StepList(tokens, trained, per_step, steps, seed)


def every_micro_batch(run: StepList, cap: int):
    """As the engine makes them: step by step, samples without anything to train left out."""
    for step in range(run.steps):
        chosen = [i for i in step_samples(len(run.tokens), run.samples_per_step, step, run.seed) if run.tokens[i]]
        for number, group in enumerate(pack([int(run.tokens[i]) for i in chosen], cap)):
            members = [chosen[place] for place in group]
            sizes = [int(run.tokens[i]) for i in members]
            yield sum(sizes), max(sizes), sum(int(run.trained[i]) for i in members), number > 0


def covers(larger, smaller) -> bool:
    return all(more >= less for more, less in zip(larger, smaller, strict=True))


@given(SAMPLES, st.integers(1, 150), st.integers(1, 9), st.integers(0, 3))
def test_the_largest_occur_and_cover_every_other(samples, cap, per_step, seed):
    run = step_list(samples, per_step=per_step, seed=seed)
    made = set(every_micro_batch(run, cap))
    found = largest_micro_batches(run, cap)
    assert {one[:4] for one in found} <= made
    assert all(any(covers(one[:4], size) for one in found) for size in made)
    for one in found:
        assert sum(run.tokens[list(one.samples)]) == one.tokens
        assert set(one.samples) <= set(run.samples(one.step))
        assert not any(covers(other[:4], one[:4]) for other in found if other is not one)


@given(SAMPLES, st.integers(1, 150))
def test_steps_that_are_too_many_are_bounded_from_above(samples, cap):
    run = step_list(samples)
    allowed, workloads.PACKED_STEPS = workloads.PACKED_STEPS, 2
    try:
        found = largest_micro_batches(run, cap)
    finally:
        workloads.PACKED_STEPS = allowed
    assert all(any(covers(one[:4], size) for one in found) for size in every_micro_batch(run, cap))


@given(SAMPLES, st.integers(1, 150), st.integers(0, 50))
def test_an_evaluation_takes_the_first_group_of_what_is_left(samples, cap, most):
    run = step_list(samples)
    left = [i for i in range(min(most, len(samples))) if run.tokens[i]]
    made = set()
    while left:
        group = [left[place] for place in pack([int(run.tokens[i]) for i in left], cap)[0]]
        sizes = [int(run.tokens[i]) for i in group]
        made.add((sum(sizes), max(sizes), sum(int(run.trained[i]) for i in group), False))
        left = [i for i in left if i not in group]
    found = largest_held_out(run.tokens, run.trained, cap, most)
    assert {one[:4] for one in found} <= made
    assert all(any(covers(one[:4], size) for one in found) for size in made)


def test_the_first_of_a_step_meets_no_gradients_and_the_second_does():
    run = step_list([(10, 5), (8, 8)], per_step=2, steps=1)
    first, second = largest_micro_batches(run, 10)
    assert first[:4] == (10, 10, 5, False)
    assert second[:4] == (8, 8, 8, True)
    together = largest_micro_batches(run, 18)
    assert [one[:4] for one in together] == [(18, 10, 13, False)]


def test_workloads_hold_every_largest_micro_batch():
    run = step_list([(10, 5), (8, 8)], per_step=2, steps=1)
    held_out = largest_held_out(run.tokens, run.trained, 18, 200)
    made = workloads_of(largest_micro_batches(run, 10), held_out)
    assert made == (
        Workload(10, 10, 5, True, 18, 10, 13),
        Workload(8, 8, 8, False),
    )
    assert workloads_of([], []) == ()
    assert workloads_of(largest_micro_batches(run, 18), [])[0].held_out_tokens == 0
