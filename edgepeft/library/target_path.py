"""Where a merged model or an exported adapter goes: checked first, written beside, put in place whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from edgepeft.errors import BadInput, DiskProblem, UsageError
from edgepeft.library.merging import MERGE_RECORD
from edgepeft.library.store import CONFIG_FILE
from edgepeft.models.store import ModelEntry, list_models
from edgepeft.paths import disk_errors, home, sync_folder, temporary_folder

Kind = Literal["model", "adapter", "gguf"]
"""A folder with a model, one with an adapter, or a GGUF file."""
_MARKS = {"model": MERGE_RECORD, "adapter": CONFIG_FILE}
"""The file by which a folder of a kind is known."""


def check_target(path: Path, kind: Kind, *, replace: bool, base: ModelEntry, adapter: Path | None = None) -> Path:
    """The absolute path of what is to be written.

    Args:
        path: as the user says it.
        kind: of what is written.
        replace: whether something of the same kind may be replaced.
        base: whose own files are never replaced, nor are those of any other model in the store.
        adapter: whose folder is never replaced either; None where there is none.

    Raises:
        UsageError: a GGUF file without its ending, or a folder with it.
        BadInput: something is there that must not be replaced.
    """
    target = path.expanduser().absolute()
    if kind == "gguf" and target.suffix != ".gguf":
        raise UsageError(f"{path} is no name of a GGUF file", where="--out", hint=f"Use for example {path}.gguf")
    if kind != "gguf" and target.suffix == ".gguf":
        option = "--format gguf-f16" if kind == "model" else "--format gguf"
        raise UsageError(f"{path} is named like a GGUF file", where="--out", hint=f"Add {option}, or name a folder")
    _check_not_ours(target, base)
    if not target.parent.is_dir():
        raise BadInput("there is no such folder", where=str(target.parent), hint="Make it first, or name another --out")
    if kind == "gguf":
        if target.is_dir():
            raise BadInput("is a folder", where=str(path), hint="Name a file")
        if target.exists() and not replace:
            raise BadInput("is there already", where=str(path), hint="Name another file, or replace it with --force")
    elif target.exists() and not target.is_dir():
        raise BadInput("is a file", where=str(path), hint="Name a folder")
    elif target.is_dir() and any(target.iterdir()):
        if not replace:
            raise BadInput(
                "the folder is not empty", where=str(path), hint="Name another one, or replace it with --force"
            )
        if not (target / _MARKS[kind]).is_file() or any(inner.is_dir() for inner in target.iterdir()):
            what = "a model that a merge wrote" if kind == "model" else "an adapter"
            raise BadInput(
                f"the folder holds something else than {what}, and is not replaced",
                where=str(path),
                hint="Name another one",
            )
        if adapter is not None and adapter.resolve().is_relative_to(target.resolve()):
            raise BadInput("holds the adapter itself", where=str(path), hint="Name another place")
    return target


@contextlib.contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """An empty hidden folder beside `target`; it and what is left in it is gone afterwards.

    Raises:
        DiskProblem: the disk is full, or may not be written.
    """
    with _disk_errors(target.parent), temporary_folder(target.parent, f".{target.name}.", ".partial") as work:
        yield work


def put_in_place(made: Path, target: Path) -> None:
    """Renames a finished file or folder to `target`, in the place of what is there; it survives a power cut.

    Raises:
        DiskProblem: the disk may not be written.
    """
    with _disk_errors(target):
        for file in [made] if made.is_file() else sorted(path for path in made.rglob("*") if path.is_file()):
            with file.open("rb+") as written:
                os.fsync(written.fileno())
        if made.is_file():
            made.replace(target)
        else:
            old = made.with_name(f"{made.name}.replaced")
            if target.exists():
                target.rename(old)
            try:
                made.rename(target)
            except BaseException:
                if old.exists():
                    old.rename(target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        sync_folder(target.parent)


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """As `paths.disk_errors`, for a place that the user named."""
    try:
        with disk_errors(path):
            yield
    except DiskProblem as error:
        raise DiskProblem(
            error.what, where=error.where, hint="Free some space, change the permissions, or name another --out"
        ) from error


def _check_not_ours(target: Path, base: ModelEntry) -> None:
    real = target.resolve()
    folders = home()
    for place in (folders.models, folders.adapters, folders.runs, folders.cache):
        if real.is_relative_to(place.resolve()):
            raise BadInput(
                "lies where edgepeft keeps its own things", where=str(target), hint="Name a folder elsewhere"
            )
    for model in (base, *list_models()):
        for own in (Path(model.weights), Path(model.source)):
            if real == own.resolve() or own.resolve().is_relative_to(real):
                what = "the base's own files" if model is base else f"the files of the model {model.name}"
                raise BadInput(f"holds {what}", where=str(target), hint="Name another place")
