"""Before the first step of a run: an adapter that trains single entries looks at samples to choose them.

Each sample goes through the model by itself, so what is chosen depends neither on how samples share micro-batches nor
on where memory ran out. The places are saved with every checkpoint: once a step is done, a run never chooses again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from edgepeft.data.schedule import step_samples, steps_per_epoch
from edgepeft.engine.methods.adapter import ChoosesFirst
from edgepeft.engine.training.recovery import release_memory, smaller_layout, what_would_help
from edgepeft.engine.training.step import MicroBatchTooLarge
from edgepeft.errors import OutOfMemory
from edgepeft.runs.events import PhaseChanged

if TYPE_CHECKING:
    from edgepeft.engine.training.loop import Training

LOOKED_AT = 32
"""Samples that are looked at, the first ones of training; all of them where there are fewer."""


def choose_entries(training: Training) -> None:
    """Chooses by gradients what the adapter trains, where it has not been chosen yet; does nothing otherwise.

    Raises:
        OutOfMemory: a sample alone does not fit.
        StopRun: somebody asked to stop.
    """
    found = [update for update in training.adapter.updates.values() if isinstance(update, ChoosesFirst)]
    updates = [update for update in found if update.chooses]
    if not updates or not training.starts_anew:
        return
    recipe = training.plan.spec.recipe
    wanted = min(LOOKED_AT, len(training.train))
    numbers: list[int] = []
    for step in range(steps_per_epoch(len(training.train), recipe.samples_per_step)):
        if len(numbers) < wanted:
            numbers += step_samples(len(training.train), recipe.samples_per_step, step, recipe.seed)
    samples = training.train.read(numbers[:wanted])
    training.emit(PhaseChanged(name="train", detail=f"choosing entries by the gradients of {len(samples)} samples"))
    layout = msgspec.structs.replace(training.position.layout, micro_batch_tokens=1)
    while True:
        for update in updates:
            update.begin_looking()
        failed: tuple[int, str] | None = None
        try:
            training.runner.train(samples, layout, 0)
            break
        except MicroBatchTooLarge as error:
            # Not the error itself, which holds on to what did not fit.
            failed = error.tokens, str(error)
        release_memory()
        tokens, message = failed
        smaller = smaller_layout(layout, tokens, 1, card=training.loaded.device.type == "cuda")
        if smaller is None:
            raise OutOfMemory(
                f"memory ran out while entries were chosen, at a sample with {tokens:,} tokens ({message})",
                hint=what_would_help(tokens, recipe),
            )
        layout = smaller[0]
    for update in updates:
        update.choose()
