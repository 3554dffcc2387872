"""When layers begin to train, as a plan tells it; the schedule itself is `spec.Unfreeze`."""

from __future__ import annotations

from edgepeft.errors import UsageError
from edgepeft.methods import id_of, method_of
from edgepeft.models.shape import ModelShape
from edgepeft.spec import Layout, Recipe
from edgepeft.units import format_share


def check_unfreezing(recipe: Recipe, shape: ModelShape, steps: int) -> None:
    """Refuses a schedule that never lets all layers train, or of layers in which the method trains nothing.

    Args:
        recipe: of the run.
        shape: its base.
        steps: of the run; 0 where they are not known.

    Raises:
        UsageError: naming the option.
    """
    schedule = recipe.unfreeze
    if schedule is None:
        return
    where = "--unfreeze-every" if schedule.every_steps else "--unfreeze"
    if not method_of(recipe.method).trained(recipe.method, shape).of_layer:
        raise UsageError(
            f"the method {id_of(recipe.method)} trains nothing in single layers", where=where, hint="Leave it out"
        )
    if steps and (full := schedule.full_from(steps, shape.layers)) >= steps:
        most = (steps - 1) // max(1, shape.layers - 1)
        every = f"Use --unfreeze-every {most} or less, or " if most else "Use "
        raise UsageError(
            f"the {shape.layers} layers all train from step {full + 1:,} on, and the run has {steps:,}",
            where=where,
            hint=f"{every}--unfreeze 0.5 for a share of the steps",
        )


def say_unfreezing(recipe: Recipe) -> str:
    """The schedule as people write it."""
    schedule = recipe.unfreeze
    if schedule is None:
        return "none"
    if schedule.every_steps:
        return f"a layer every {schedule.every_steps:,} step" + ("s" if schedule.every_steps > 1 else "")
    return f"over {format_share(schedule.share or 0.0, digits=0)} of the steps"


def explain_unfreezing(recipe: Recipe, shape: ModelShape, steps: int) -> str:
    """What it does, in a line."""
    schedule = recipe.unfreeze
    if schedule is None or not steps:
        return "the top layer first; memory is that of the end, when all train"
    full = schedule.full_from(steps, shape.layers)
    return f"the top layer first, all {shape.layers} from step {full + 1:,} on; memory is that of the end"


def training_share(recipe: Recipe, shape: ModelShape, steps: int) -> float:
    """How much of the layers a backward goes through, averaged over the steps of a run."""
    return sum(_shares(recipe, shape, steps)) / steps


def work_of_steps(recipe: Recipe, layout: Layout, shape: ModelShape, steps: int) -> list[float]:
    """What each step of a run costs, in forwards: backward costs as much again, and recomputing once more."""
    back = 1.0 if layout.checkpointing == "none" else 2.0
    return [1.0 + back * share for share in _shares(recipe, shape, steps)]


def _shares(recipe: Recipe, shape: ModelShape, steps: int) -> list[float]:
    """How much of the layers backward goes through, step by step."""
    schedule = recipe.unfreeze
    if schedule is None or method_of(recipe.method).trained(recipe.method, shape).others:
        # What is of no layer may lie below all of them.
        return [1.0] * steps
    return [schedule.layers_at(step, steps, shape.layers) / shape.layers for step in range(steps)]
