"""What happens between loading and the first step: whatever could run out of memory later is done now, and undone.

With all layers training, as at the end of the run, the optimizer's state is made, the largest micro-batches of the
steps that are left are tried, and the largest of an evaluation. Where they do not fit, the layout shrinks as in a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from edgepeft.engine.kernels import target_of
from edgepeft.engine.training.choosing import choose_entries
from edgepeft.engine.training.ending import reason_to_end
from edgepeft.engine.training.memory import Size
from edgepeft.engine.training.probe import choose_trials, step_bytes, try_micro_batch
from edgepeft.engine.training.recovery import first_line, is_out_of_memory, smaller_layout
from edgepeft.engine.training.step import MicroBatchTooLarge
from edgepeft.engine.training.stopping import StopRun
from edgepeft.errors import OutOfMemory
from edgepeft.memory.assembly import is_exact
from edgepeft.memory.optimizer import state_bytes
from edgepeft.memory.weights import base_bytes
from edgepeft.memory.workload import Workload
from edgepeft.methods import method_of
from edgepeft.plan.workloads import MicroBatchSize, StepList
from edgepeft.runs.events import Cause, PhaseChanged, Warned
from edgepeft.units import format_bytes

if TYPE_CHECKING:
    from edgepeft.engine.training.loop import Training


def prepare(training: Training, smaller: Cause | None = None) -> bool:
    """Makes sure that the steps that are left fit; returns whether somebody asked to stop meanwhile.

    Raises:
        OutOfMemory: they do not, in no layout.
    """
    training.emit(PhaseChanged(name="load", detail="trying the model on a few tokens"))
    with training.gauge.watch():
        told = training.runner.check()
    if told:
        training.emit(Warned(message=told, step=training.position.step))
    training.tell_memory("load")
    if reason_to_end(training.position, training.steps, training.plan.spec.upkeep) is not None:
        return False
    _let_gauge_compare(training)
    training.unfreezing.train_all()
    try:
        if smaller is not None:
            _begin_smaller(training, smaller)
        choose_entries(training)
        _create_state(training)
        _probe(training)
    except StopRun:
        return True
    finally:
        training.unfreezing.begin_step(training.position.step)
        training.update.drop_idle_state()
    return False


def _let_gauge_compare(training: Training) -> None:
    """Tells the gauge what micro-batches need, so that only those are followed that may need most."""
    shape, target = training.loaded.shape, target_of(training.loaded.device)
    if not is_exact(shape):
        return
    recipe = training.plan.spec.recipe
    base = sum(base_bytes(shape, recipe.precision, recipe.compute_dtype).values())

    def predict(size: Size) -> int:
        spec = msgspec.structs.replace(training.plan.spec, layout=training.position.layout)
        # Which rows of all meet the head matters little: all of them, for every micro-batch alike.
        workload = Workload(size.tokens, size.longest, size.tokens, alone=not size.gradients, samples=size.samples)
        return step_bytes(spec, shape, target, workload) - base

    training.gauge.predict = predict


def _create_state(training: Training) -> None:
    failed = ""
    try:
        with training.gauge.watch():
            training.update.create_state()
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failed = first_line(error)
    sizes = [parameter.numel() for parameter in training.update.parameters.values()]
    needed = state_bytes(training.plan.spec.recipe.optimizer.name, sizes)
    smaller = "a smaller --rank or " if method_of(training.plan.spec.recipe.method).ranked else ""
    raise OutOfMemory(
        f"the optimizer's state of {format_bytes(needed)} does not fit beside the model ({failed})",
        hint=f"Close other programs and resume the run, or plan again with {smaller}a larger --budget",
    )


def _trials(training: Training) -> list[MicroBatchSize]:
    """The micro-batches of the steps that are left which need most memory in the layout in force."""
    recipe = training.plan.spec.recipe
    run = StepList(
        *training.train.trainable(), recipe.samples_per_step, training.steps, recipe.seed, training.position.step
    )
    spec = msgspec.structs.replace(training.plan.spec, layout=training.position.layout)
    return choose_trials(run, spec, training.loaded.shape, target_of(training.loaded.device))


def _begin_smaller(training: Training, cause: Cause) -> None:
    """Takes the next smaller layout, since the worker before this one did not survive the one in force."""
    largest = max(_trials(training), key=lambda size: size.tokens, default=None)
    layout, card = training.position.layout, training.loaded.device.type == "cuda"
    found = largest and smaller_layout(layout, largest.tokens, len(largest.samples), card=card)
    if found:
        training.take_layout(*found, cause)
    else:
        training.emit(
            Warned(message="no smaller layout is left; the run goes on as it was", step=training.position.step)
        )


def _probe(training: Training) -> None:
    """Tries the largest micro-batches of the steps that are left; where they do not fit, the layout shrinks."""
    peak_before = training.gauge.peak_bytes
    while True:
        failed: tuple[int, int, str] | None = None
        try:
            for size in _trials(training):
                _told(training, f"trying the largest micro-batch, {size.tokens:,} tokens")
                samples = training.train.read(size.samples)
                try_micro_batch(
                    training.runner, training.update, training.gauge, size, samples, training.position.layout
                )
            break
        except MicroBatchTooLarge as error:
            failed = (error.tokens, error.samples, str(error))
        training.shrink(*failed, "probe")
    if training.gauge.peak_bytes > peak_before:
        training.tell_memory("train step")
    if training.evaluations.samples:
        peak_before = training.gauge.peak_bytes
        _told(training, "trying the largest evaluation")
        training.evaluations.try_largest(training.position.layout, training.position.step)
        if training.gauge.peak_bytes > peak_before:
            training.tell_memory("evaluation")


def _told(training: Training, detail: str) -> None:
    training.emit(PhaseChanged(name="train", detail=detail))
