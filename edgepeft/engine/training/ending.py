"""Why a run ends, and which of its states becomes the adapter.

Both follow from the position and the plan alone, so that a run which is killed and resumed ends where, and with what,
it would have ended.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from edgepeft.engine.training.checkpoints import RunPosition, read_adapter_of
from edgepeft.runs.events import EndedBy, Warned
from edgepeft.spec import Upkeep

if TYPE_CHECKING:
    from edgepeft.engine.training.loop import Training

CLEARLY = 0.001
"""Share by which the best held-out loss must be below the last one to be preferred to it. Nearer ones differ by the
order of the samples, and the last state has seen more of them, at a lower learning rate."""


class Kept(NamedTuple):
    """The state that becomes the adapter."""

    step: int
    eval_loss: float | None


def reason_to_end(position: RunPosition, steps: int, upkeep: Upkeep) -> EndedBy | None:
    """Why no further step is made; None as long as one is.

    The time is that of training steps, added up over all processes by a clock that nobody can set.
    """
    if position.step >= steps:
        return "steps"
    if 0 < upkeep.early_stop <= position.evaluations_without_gain:
        return "early stop"
    if upkeep.max_seconds is not None and position.train_seconds >= upkeep.max_seconds:
        return "time"
    return None


def protected_steps(position: RunPosition, upkeep: Upkeep) -> set[int]:
    """The checkpoints that must stay, however old they are: the best, and one to go back to if the run diverges."""
    return {position.sound_step, position.unproven_step} | (
        {position.best_eval_step} if upkeep.keep == "best" else set()
    )


def without_lost_best(position: RunPosition, upkeep: Upkeep, checkpoints: Path) -> tuple[RunPosition, str]:
    """The position to go on from, and a complaint where the best state that it tells of is not there any more.

    That happens when a checkpoint after it, made once a better state was found, turned out to be damaged.
    """
    step = position.best_eval_step
    if upkeep.keep != "best" or step in (-1, position.step) or (checkpoints / f"step-{step}").is_dir():
        return position, ""
    forgotten = msgspec.structs.replace(position, best_eval_loss=None, best_eval_step=-1, evaluations_without_gain=0)
    return forgotten, f"the best state so far, of step {step}, is gone; the best from here on is kept"


def keep_state(training: Training) -> Kept:
    """Puts the state that becomes the adapter into the training's adapter; to be called once no step follows."""
    position, upkeep = training.position, training.plan.spec.upkeep
    last = Kept(position.step, position.last_eval_loss)
    best = position.best_eval_loss
    if upkeep.keep != "best" or best is None or position.best_eval_step == position.step:
        return last
    if last.eval_loss is not None and math.isfinite(last.eval_loss) and best >= (1 - CLEARLY) * last.eval_loss:
        return last
    values = read_adapter_of(training.run.checkpoints, position.best_eval_step)
    if values is None:
        message = f"the best state, of step {position.best_eval_step}, is damaged; the last one is kept"
        training.emit(Warned(message=message, step=position.step))
        return last
    training.adapter.load_state_dict(values)
    return Kept(position.best_eval_step, best)


def complaint_about(kept: Kept, base_loss: float | None) -> str:
    """A sentence where the adapter is no better than its base; empty where it is, or nobody knows."""
    if kept.eval_loss is None or base_loss is None or kept.eval_loss < base_loss:
        return ""
    return (
        f"the adapter is no better than its base on the held-out samples (loss {kept.eval_loss:.4f}, base "
        f"{base_loss:.4f}): more or other data, a lower learning rate or fewer epochs may help"
    )
