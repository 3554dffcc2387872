"""The values that a run's adapter starts with, where it continues another one."""

from __future__ import annotations

import hashlib

from edgepeft.engine.methods import AttachedAdapter
from edgepeft.engine.methods.files import read_values
from edgepeft.engine.model.load import LoadedModel
from edgepeft.errors import BadInput
from edgepeft.library.store import WEIGHTS_FILE
from edgepeft.runs.layout import RunFolder
from edgepeft.spec import Recipe


def load_start(run: RunFolder, recipe: Recipe, loaded: LoadedModel, adapter: AttachedAdapter) -> None:
    """Copies the values of the recipe's parent into `adapter`; does nothing where there is no parent.

    They come from the run's own folder, so neither the library nor the folder that the parent was taken from is read.

    Raises:
        BadInput: they are gone, are not those of the recipe, or do not fit the model.
    """
    if recipe.parent is None:
        return
    weights = run.start / WEIGHTS_FILE
    hint = "Start a new run with --from"
    if not weights.is_file():
        raise BadInput(f"the values of {recipe.parent.adapter} are gone", where=str(weights), hint=hint)
    with weights.open("rb") as file:
        found = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    if found != recipe.parent.sha256:
        raise BadInput(f"these are not the values of {recipe.parent.adapter}", where=str(weights), hint=hint)
    adapter.load_state_dict(read_values(run.start, loaded))
