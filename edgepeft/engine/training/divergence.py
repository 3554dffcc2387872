"""A run that gets worse instead of better: seen by its loss, ended with a diagnosis, its last good state kept.

Losses that are no numbers are `FiniteWatch`'s; here are those that are, and only grow.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgepeft.errors import EdgepeftError

if TYPE_CHECKING:
    from edgepeft.engine.training.checkpoints import RunPosition
    from edgepeft.engine.training.loop import Training

WINDOW_STEPS = 20
"""Steps whose mean loss is looked at."""
EXPLODED = 3.0
"""Times the lowest mean so far that a loss must exceed to count as exploded; it must exceed blind guessing as well."""


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
    """The loss above which a run has got worse than it ever began, and than guessing all tokens alike (ln V)."""
    return math.inf if lowest is None else max(EXPLODED * lowest, math.log(vocab))


def is_suspect(position: RunPosition, vocab: int) -> bool:
    """Whether the last step's loss is above the bar; its state should not take the place of an earlier one."""
    return bool(position.recent_losses) and position.recent_losses[-1] > bar(position.lowest_recent_loss, vocab)


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
    """Writes the adapter of the newest good checkpoint into the run folder, and says so in the error.

    Returns:
        The error to raise.

    Raises:
        DiskProblem: no space, or no permission.
    """
    from edgepeft.engine.training.checkpoints import read_newest_checkpoint
    from edgepeft.engine.training.outcome import write_adapter

    found = read_newest_checkpoint(training.run.checkpoints, training.plan.spec.recipe, lambda complaint: None)
    if found is None or not found.position.step:
        return Diverged(error.what, hint=f"{error.hint}; there is no checkpoint from before")
    training.adapter.load_state_dict(found.adapter)
    training.position = found.position
    write_adapter(training, found.position.step, found.position.last_eval_loss)
    where = f"{training.run.adapter}"
    return Diverged(error.what, hint=f"{error.hint}; the adapter as it was after step {found.position.step} is {where}")
