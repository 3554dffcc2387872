"""Opening what a run works on: its base, checked to be the planned one, its data, and the model in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from edgepeft.data.prepare import PreparedData, check_unchanged, prepare
from edgepeft.engine.heap import trim_heap
from edgepeft.engine.model.load import LoadedModel, load_model
from edgepeft.engine.training.account import MemoryAccount
from edgepeft.engine.training.limit import MemoryLimit
from edgepeft.engine.training.recovery import first_line, is_out_of_memory
from edgepeft.errors import BadInput, DoesNotFit, EdgepeftError, OutOfMemory
from edgepeft.models.store import ModelEntry, find_model, verify_unchanged
from edgepeft.runs.control import FORCE_HINT
from edgepeft.runs.events import Event, PhaseChanged, Warned
from edgepeft.spec import Recipe
from edgepeft.units import format_bytes

Emit = Callable[[Event], None]
_TOLD_SECONDS = 0.5
"""Least time between two events that only tell how far something is."""


def find_base(recipe: Recipe) -> ModelEntry:
    """The base in the store.

    Raises:
        BadInput: it is gone, was changed, or is not the one that was planned with.
    """
    entry = find_model(recipe.base.model)
    if entry.fingerprint != recipe.base.fingerprint:
        raise BadInput(
            f"model {entry.name} in the store is not the one that was planned with",
            where=recipe.base.model,
            hint="Add the model of the plan under this name again, or plan anew",
        )
    verify_unchanged(entry)
    return entry


def open_data(recipe: Recipe, entry: ModelEntry, emit: Emit, *, forced: bool = False) -> PreparedData:
    """The token tables of the run.

    Args:
        recipe: of the run.
        entry: its base.
        emit: told how far it is.
        forced: go on with cached tokens where a file has changed or is gone.

    Raises:
        BadInput: the data is not that of the plan.
    """
    name = Path(recipe.data.path).name
    emit(PhaseChanged(name="data", detail=name))
    for told_of in check_unchanged(recipe.data, forced=forced, hint=FORCE_HINT):
        emit(Warned(message=told_of))
    told = [time.monotonic()]

    def progress(done: int, total: int) -> None:
        if time.monotonic() - told[0] > _TOLD_SECONDS:
            told[0] = time.monotonic()
            emit(PhaseChanged(name="data", detail=name, fraction=done / max(1, total)))

    data = prepare(recipe.data, Path(entry.folder), progress=progress)
    # A tokenizer of some tens of megabytes is gone again: weights then come to lie where it was.
    trim_heap()
    return data


def check_same_tokens(before: str, now: str, recipe: Recipe) -> None:
    """Refuses tokens that another tokenizer or chat template made of the same files.

    Args:
        before: key of the tokens that a checkpoint was trained on; empty where it does not know.
        now: key of those that were opened.
        recipe: of the run.

    Raises:
        BadInput: they differ.
    """
    if before and before != now:
        raise BadInput(
            f"the tokenizer of {recipe.base.model} or the chat template has changed since the checkpoint was written: "
            "the same data gives other tokens now",
            where=recipe.data.template or recipe.base.model,
            hint="Put the files back as they were, or train anew",
        )


def load_base(
    recipe: Recipe, entry: ModelEntry, device: torch.device, account: MemoryAccount, limit: MemoryLimit, emit: Emit
) -> LoadedModel:
    """The model in memory, loaded within the limit.

    Raises:
        BadInput: its files are damaged or not supported.
        DoesNotFit: the base alone takes more than the run's budget.
        OutOfMemory: it takes more than is free now.
    """
    emit(PhaseChanged(name="load", detail=entry.name))
    told = [time.monotonic()]

    def progress(what: str, fraction: float | None) -> None:
        if time.monotonic() - told[0] > _TOLD_SECONDS:
            told[0] = time.monotonic()
            emit(PhaseChanged(name="load", detail=what, fraction=fraction))

    why = ""
    try:
        with account.gauge.watch(itemised=True):
            return load_model(
                entry,
                precision=recipe.precision,
                compute_dtype=recipe.compute_dtype,
                device=device,
                progress=progress,
                warn=lambda message: emit(Warned(message=message)),
            )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        why = first_line(error)
    raise base_too_large(entry.name, recipe, limit, why)


def base_too_large(name: str, recipe: Recipe, limit: MemoryLimit, why: str) -> EdgepeftError:
    """The error for a base that does not fit alone.

    Args:
        name: of the model.
        recipe: of the run.
        limit: what the process may take.
        why: what the allocator said.
    """
    smaller = "" if recipe.precision == "nf4" else " with --precision nf4,"
    if limit.limit_bytes is not None and not limit.lowered:
        return DoesNotFit(
            f"{name} alone, in {recipe.precision}, needs more than the {format_bytes(limit.limit_bytes)} of the run's "
            "budget while it is loaded",
            where="load",
            hint=f"Plan again{smaller} with a larger --budget, or with a smaller model",
        )
    free = "" if limit.limit_bytes is None else f" than the {format_bytes(limit.limit_bytes)} that it may take now"
    return OutOfMemory(
        f"{name} alone, in {recipe.precision}, needs more memory{free} while it is loaded ({why.rstrip('.')})",
        where="load",
        hint=f"Close other programs and resume the run, or plan again{smaller} with a smaller model",
    )
