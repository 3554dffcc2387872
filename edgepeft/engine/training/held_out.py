"""Evaluations as a run makes them: of the base before the first step, then of the adapter, and what they tell."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from edgepeft.engine.methods import set_active
from edgepeft.engine.training.evaluation import HeldOutLoss, improves
from edgepeft.runs.events import Evaluated, PhaseChanged, Warned

if TYPE_CHECKING:
    from edgepeft.engine.training.loop import Training

GOOD_PERPLEXITY = 1.1
"""Of the base, up to which little is left to learn: it gives the next token 10 in 11 on average."""


def evaluate_base(training: Training) -> None:
    """Measures the base alone and answers the sample prompts with it, before the first step; once in a run.

    Raises:
        OutOfMemory: not even one held-out sample fits.
        StopRun: somebody wants the run to stop.
    """
    if training.position.step or training.position.base_eval_loss is not None:
        return
    with _base_alone(training):
        found = _measure(training)
        if found is not None:
            training.position = msgspec.structs.replace(training.position, base_eval_loss=found.loss)
            training.emit(_event(0, found))
            if verdict := verdict_on_base(found.loss, training.loaded.shape.vocab):
                training.emit(Warned(message=verdict, step=0))
        training.samples.answer(0)


def evaluate(training: Training) -> None:
    """Measures the adapter as it is, remembers whether it gained, keeps the best state, answers the sample prompts.

    Raises:
        DiskProblem: the best state cannot be kept.
        OutOfMemory: not even one held-out sample fits.
        StopRun: somebody wants the run to stop.
    """
    found, position = _measure(training), training.position
    if found is not None:
        gained = improves(found.loss, position.best_eval_loss)
        position = msgspec.structs.replace(position, last_eval_loss=found.loss, last_eval_step=position.step)
        if gained:
            training.position = msgspec.structs.replace(
                position, best_eval_loss=found.loss, best_eval_step=position.step, evaluations_without_gain=0
            )
        else:
            training.position = msgspec.structs.replace(
                position, evaluations_without_gain=position.evaluations_without_gain + 1
            )
        training.emit(_event(position.step, found, best=gained))
        if gained and training.plan.spec.upkeep.keep == "best":
            training.save_checkpoint()
    training.samples.answer(position.step)


def verdict_on_base(loss: float, vocab: int) -> str:
    """What a person should know when the base is already good at the task, or hopeless; empty in between.

    Args:
        loss: mean over the held-out trained tokens, natural logarithm.
        vocab: entries of the output head; guessing all of them alike gives ln V.
    """
    if not loss <= math.log(vocab):
        return (
            f"the base does worse on the held-out samples (loss {loss:.2f}) than guessing all {vocab:,} tokens alike "
            f"({math.log(vocab):.2f}): its weights, its tokenizer or the chat template may not belong together, or it "
            "knows nothing of this kind of text"
        )
    if loss <= math.log(GOOD_PERPLEXITY):
        return (
            f"the base is already good at this: its held-out loss is {loss:.3f}, a perplexity of {math.exp(loss):.2f}, "
            "so there is little to learn; see whether the answers stand in the prompts"
        )
    return ""


def _measure(training: Training) -> HeldOutLoss | None:
    peak_before = training.gauge.peak_bytes
    if training.evaluations.samples:
        training.emit(PhaseChanged(name="evaluate"))
    found = training.evaluations.evaluate(training.position.layout, training.position.step)
    if training.gauge.peak_bytes > peak_before:
        training.tell_memory("evaluation")
    return found


def _event(step: int, found: HeldOutLoss, *, best: bool = False) -> Evaluated:
    return Evaluated(step=step, loss=found.loss, samples=found.samples, trained_tokens=found.trained_tokens, best=best)


@contextmanager
def _base_alone(training: Training) -> Iterator[None]:
    set_active(training.loaded, [])
    try:
        yield
    finally:
        set_active(training.loaded, [(training.adapter.name, 1.0)])
