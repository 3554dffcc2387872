"""A run that gets worse instead of better: seen by its loss, ended with a diagnosis, its last good state kept.

Losses that are no numbers are `FiniteWatch`'s; here are those that are, and only grow.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

from edgepeft.errors import EdgepeftError

if TYPE_CHECKING:
    from edgepeft.engine.training.checkpoints import RunPosition
    from edgepeft.engine.training.loop import Training

WINDOW_STEPS = 20
"""Steps whose mean loss is looked at."""
EXPLODED = 2.0
"""Times the lowest mean so far that a loss must exceed to count as exploded."""
BLIND = 0.95
"""Share of the loss of blind guessing, ln V, that it must exceed as well. An adapter that grew beyond all bounds often
comes to rest near there, with the same answer to everything."""
SOUND_STEPS = 5
"""Steps whose mean loss tells whether a checkpoint is one to go back to."""
SOUND = 1.5
"""Times the lowest mean up to which it is."""


class Diverged(EdgepeftError):
    """Training makes the adapter worse, and no further step would change that."""


def followed(recent: tuple[float, ...], lowest: float | None, loss: float) -> tuple[tuple[float, ...], float]:
    """The last losses with one more, and the lowest mean of such a window so far.

    Args:
        recent: losses of the last steps, oldest first; at the beginning of a run fewer than a window.
        lowest: the lowest mean before; None before the first step, whose loss is the base's own.
        loss: of one more step, finite.
    """
    recent = (*recent, loss)[-WINDOW_STEPS:]
    mean = sum(recent) / len(recent)
    return recent, mean if lowest is None else min(lowest, mean)


def bar(lowest: float | None, vocab: int) -> float:
    """The loss above which a run is far worse than it was, and no better than guessing all tokens alike (ln V)."""
    return math.inf if lowest is None else max(EXPLODED * lowest, BLIND * math.log(vocab))


def is_sound(recent: tuple[float, ...], lowest: float | None) -> bool:
    """Whether the last steps were about as good as any before."""
    last = recent[-SOUND_STEPS:]
    return not last or lowest is None or sum(last) / len(last) <= SOUND * lowest


def with_sound_step(position: RunPosition) -> RunPosition:
    """The position as a checkpoint has it that is made now.

    A step's loss is that of the state before it: whether a checkpoint is one to go back to, only later steps tell.
    """
    step, candidate = position.step, position.unproven_step
    if not is_sound(position.recent_losses, position.lowest_recent_loss):
        return msgspec.structs.replace(position, unproven_step=-1)
    if candidate < 0:
        return msgspec.structs.replace(position, unproven_step=step)
    if step - candidate < SOUND_STEPS:
        return position
    return msgspec.structs.replace(position, sound_step=candidate, unproven_step=step)


def check_divergence(position: RunPosition, learning_rate: float, vocab: int) -> None:
    """Ends a run whose mean loss over a whole window is above the bar.

    Args:
        position: after the step.
        learning_rate: the recipe's peak, for the message.
        vocab: rows of the output head.

    Raises:
        Diverged: with the figures.
    """
    recent, lowest = position.recent_losses, position.lowest_recent_loss
    if len(recent) < WINDOW_STEPS or lowest is None:
        return
    mean = sum(recent) / len(recent)
    if mean > bar(lowest, vocab):
        raise Diverged(
            f"training has diverged: the mean loss of the last {WINDOW_STEPS} steps is {mean:.3g}, it was {lowest:.3g} "
            f"at its best, and guessing all tokens alike gives {math.log(vocab):.3g} (step {position.step})",
            hint=f"Train anew with a learning rate far below {learning_rate:g}",
        )


def keep_last_good(training: Training, error: Diverged) -> Diverged:
    """Writes the adapter of the last sound checkpoint into the run folder, and says so in the error.

    Returns:
        The error to raise.

    Raises:
        DiskProblem: no space, or no permission.
    """
    from edgepeft.engine.training.checkpoints import read_adapter_of
    from edgepeft.engine.training.outcome import write_adapter

    step = training.position.sound_step
    values = read_adapter_of(training.run.checkpoints, step) if step > 0 else None
    if values is None:
        return Diverged(error.what, hint=f"{error.hint}; there is no checkpoint from before")
    training.adapter.load_state_dict(values)
    write_adapter(training, step, None)
    where = training.run.adapter
    return Diverged(error.what, hint=f"{error.hint}; the adapter as it was after step {step} is in {where}")
