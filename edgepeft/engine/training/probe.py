"""The largest micro-batches of a run, tried before its first step: memory runs out in its first seconds or never.

Nothing of a trial stays: parameters, optimizer state, gradients and random generators are afterwards what they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from edgepeft.data.packing import pack
from edgepeft.engine.training.batches import Sample
from edgepeft.engine.training.memory import MemoryGauge
from edgepeft.engine.training.recovery import first_line, is_out_of_memory
from edgepeft.engine.training.step import MicroBatchTooLarge, StepRunner
from edgepeft.engine.training.update import AdapterUpdate
from edgepeft.memory.estimate import estimate_training
from edgepeft.memory.target import Target
from edgepeft.memory.workload import Workload
from edgepeft.models.shape import ModelShape
from edgepeft.plan.lengths import counts_samples
from edgepeft.plan.workloads import MicroBatchSize, StepList, largest_micro_batches
from edgepeft.spec import Layout, RunSpec

NEAR = 0.99
"""Predicted need, as a share of the largest, from which a micro-batch is tried too: the prediction ranks, no more."""
MOST_TRIALS = 2
"""Micro-batches that are tried at the most; each costs about what it costs in a step."""


def choose_trials(run: StepList, spec: RunSpec, shape: ModelShape, target: Target) -> list[MicroBatchSize]:
    """The micro-batches that are predicted to need most memory in training, the largest first.

    Args:
        run: the steps that are left.
        spec: of the run, with the layout in force.
        shape: of the base.
        target: the device.
    """
    cap = spec.layout.micro_batch_tokens
    counts = counts_samples(spec.recipe)
    found = largest_micro_batches(run, cap, count_samples=counts)
    real = [size if size.samples else _largest_of_step(run, size.step, cap) for size in found]

    def needed(size: MicroBatchSize) -> int:
        workload = Workload(
            size.tokens,
            size.longest,
            size.trained,
            alone=not size.later,
            samples=len(size.samples) if counts else 0,
        )
        return step_bytes(spec, shape, target, workload)

    ranked = sorted(((needed(size), size) for size in real), key=lambda item: (-item[0], -item[1].tokens))
    return [size for bytes_, size in ranked if bytes_ >= NEAR * ranked[0][0]][:MOST_TRIALS]


def step_bytes(spec: RunSpec, shape: ModelShape, target: Target, workload: Workload) -> int:
    """The predicted peak of a train step."""
    phases = estimate_training(spec, shape, workload, target).phases
    return next(phase.total_bytes for phase in phases if phase.name == "train step")


def _largest_of_step(run: StepList, step: int, cap: int) -> MicroBatchSize:
    chosen = run.samples(step)
    groups = pack([int(run.tokens[index]) for index in chosen], cap)
    sizes = []
    for number, group in enumerate(groups):
        samples = tuple(chosen[place] for place in group)
        tokens = [int(run.tokens[index]) for index in samples]
        trained = sum(int(run.trained[index]) for index in samples)
        sizes.append(MicroBatchSize(sum(tokens), max(tokens), trained, number > 0, step, samples))
    return max(sizes)


def try_micro_batch(
    runner: StepRunner,
    update: AdapterUpdate,
    gauge: MemoryGauge,
    size: MicroBatchSize,
    samples: Sequence[Sample],
    layout: Layout,
) -> None:
    """Forward and backward of one micro-batch, with gradients before it where its step has them.

    Args:
        runner: of the run.
        update: its optimizer state must exist.
        gauge: measures it, on a card too storage by storage.
        size: what is tried.
        samples: its samples.
        layout: in force.

    Raises:
        MicroBatchTooLarge: memory ran out.
    """
    failed = ""
    with _nothing_stays(update):
        try:
            if size.later:
                update.create_gradients()
            on_card: AbstractContextManager[object] = nullcontext()
            if gauge.device.type != "cpu":
                on_card = gauge.watch(itemised=True)
            with on_card:
                runner.train(samples, layout, size.step, watch_all=True)
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failed = first_line(error)
    raise MicroBatchTooLarge(size.tokens, len(samples), failed)


@contextmanager
def _nothing_stays(update: AdapterUpdate) -> Iterator[None]:
    # As bytes: a tensor of the state would count among those that the trial measures.
    cpu = bytearray(torch.get_rng_state().numpy().tobytes())
    card = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        update.drop_gradients()
        torch.set_rng_state(torch.frombuffer(cpu, dtype=torch.uint8))
        if card is not None:
            torch.cuda.set_rng_state(card)
