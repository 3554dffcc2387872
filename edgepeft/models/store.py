"""The store of base models: one folder each under `home().models`, with what the light side reads.

A folder of safetensors is used where it lies; only its config, tokenizer and chat template are copied. A GGUF file is
converted once. Work in progress lies under a hidden name and takes its place by one rename, under a lock.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from edgepeft.errors import BadInput, DiskProblem
from edgepeft.models.conversion import convert
from edgepeft.models.embedded import ADVISED_SAMPLING, EMBEDDED, EMBEDDED_LICENCE, embedded_gguf
from edgepeft.models.fingerprint import fingerprint_files
from edgepeft.models.gguf_header import check_convertible
from edgepeft.models.quantized import StoredAs
from edgepeft.models.references import (
    cached_repository,
    default_name,
    gguf_in,
    is_gguf,
    looks_like_path,
    model_folder,
    not_on_disk,
)
from edgepeft.models.shape import ModelShape
from edgepeft.models.source_folder import (
    FolderContents,
    copy_small_files,
    inspect_folder,
    small_files_changed,
    template_text,
)
from edgepeft.paths import as_name, check_name, disk_errors, home, make_folder, write_atomic
from edgepeft.processes import Progress
from edgepeft.units import MIB, format_bytes

Kind = Literal["folder", "copy", "gguf", "embedded"]
_ENTRY = "entry.json"
_SPARE_BYTES = 64 * MIB
_BF16_FROM_GGUF = 8
"""A GGUF of 2 bits a weight grows about eightfold when it becomes bf16."""


class ModelEntry(msgspec.Struct, frozen=True):
    """One base model in the store."""

    name: str
    """What it is called here."""
    kind: Kind
    """`folder`: weights are referred to; `copy`, `gguf`, `embedded`: weights lie in the store."""
    folder: str
    """The store's folder with config, tokenizer and chat template; absolute."""
    weights: str
    """The folder with the *.safetensors; absolute."""
    source: str
    """What it was added from; absolute."""
    fingerprint: str
    """`sha256:…` over the contents of the source's weight files."""
    shape: ModelShape
    """Of its language model."""
    stored_as: StoredAs
    """Form of the weights in their files."""
    weights_bytes: int
    """Size of the *.safetensors."""
    licence: str | None
    """As the source says it."""
    notes: tuple[str, ...]
    """What the user should know."""
    added: str
    """When, in ISO 8601."""


def list_models() -> list[ModelEntry]:
    """All models in the store, by name; folders that hold no valid entry are passed over."""
    root = home().models
    found = [_read_entry(path.parent) for path in sorted(root.glob(f"*/{_ENTRY}"))] if root.is_dir() else []
    return [entry for entry in found if entry is not None]


def find_model(reference: str) -> ModelEntry:
    """The entry of this name, or the one that was added from this path. Nothing is converted or added.

    Raises:
        BadInput: the store has none; says how to add or to download it.
    """
    if not looks_like_path(reference):
        entry = _read_entry(home().models / reference) if reference == as_name(reference) else None
        if entry is not None:
            return entry
    path = Path(reference).expanduser()
    if not path.exists():
        path = cached_repository(reference) or path
    if path.exists():
        source = str(model_folder(path))
        for entry in list_models():
            if entry.source == source:
                return entry
        raise BadInput(
            "this model is not in the store yet", where=reference, hint=f"Add it with: edgepeft models add {reference}"
        )
    if reference == EMBEDDED:
        embedded_gguf()
        raise BadInput(
            "the embedded model was not prepared yet",
            where=EMBEDDED,
            hint=f"Prepare it with: edgepeft models add {EMBEDDED}",
        )
    raise not_on_disk(reference, [entry.name for entry in list_models()])


def ensure_model(reference: str, progress: Progress | None = None) -> ModelEntry:
    """The model that `reference` means, added or converted on the way where that is needed.

    Args:
        reference: a name in the store, `smollm2-135m`, a model folder, a GGUF file, or ORG/NAME in the hub's cache.
        progress: called with the phase and the share of it that is done.

    Raises:
        BadInput: it is nowhere on this disk, or cannot be used.
        DiskProblem: the store's disk is full, or may not be written.
    """
    if not looks_like_path(reference) and reference == as_name(reference):
        entry = _read_entry(home().models / reference)
        if entry is not None:
            verify_unchanged(entry)
            return entry
    return add_model(reference, progress=progress)


def add_model(
    path: Path | str, name: str | None = None, copy: bool = False, progress: Progress | None = None
) -> ModelEntry:
    """Adds a model folder, a GGUF file or `smollm2-135m`; the same source twice is one entry.

    Args:
        path: what to add.
        name: its name in the store; by default made from the folder's or the file's.
        copy: copy the weights into the store instead of referring to them.

    Raises:
        BadInput: it cannot be used, or another model has this name.
        DiskProblem: the store's disk is full, or may not be written.
    """
    if name is not None:
        check_name(name)
    if str(path) == EMBEDDED and not Path(path).exists():
        return _add_gguf(embedded_gguf(), name or EMBEDDED, "embedded", progress, fixed_name=True)
    source = Path(path).expanduser()
    if not source.exists():
        source = cached_repository(str(path)) or source
    if not source.exists():
        raise not_on_disk(str(path), [entry.name for entry in list_models()])
    source = model_folder(source)
    file = source if source.is_file() else gguf_in(source)
    if file is not None:
        if not is_gguf(file):
            raise BadInput(
                "neither a model folder nor a GGUF file",
                where=str(file),
                hint="Give the folder that holds config.json, or a .gguf file",
            )
        return _add_gguf(file, name or default_name(file), "gguf", progress, fixed_name=name is not None)
    return _add_folder(source, name, copy, progress)


def remove_model(name: str) -> list[str]:
    """Removes a model from the store. Files that the store only refers to are left alone.

    Returns:
        What was deleted and what was left, as sentences.

    Raises:
        BadInput: there is no such model.
    """
    entry = _read_entry(home().models / name) if name == as_name(name) else None
    if entry is None:
        raise not_on_disk(name, [other.name for other in list_models()])
    folder = Path(entry.folder)
    size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    with _locked(name), disk_errors(folder):
        # Renamed first, so that nobody meets half a model.
        doomed = folder.with_name(f".{name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)
    done = [f"Deleted {folder} ({format_bytes(size)})"]
    if entry.kind == "folder":
        done.append(f"Left the weights in {entry.weights} ({format_bytes(entry.weights_bytes)})")
    elif entry.kind != "embedded":
        done.append(f"Left the source {entry.source}")
    return done


def verify_unchanged(entry: ModelEntry) -> None:
    """Checks that the weights are those that the entry was made from.

    Raises:
        BadInput: they are gone, or have changed since.
    """
    weights = Path(entry.weights)
    again = f"Add it again: edgepeft models remove {entry.name}, then edgepeft models add {entry.source}"
    files = sorted(weights.glob("*.safetensors")) if weights.is_dir() else []
    if not files:
        raise BadInput(
            f"the weights of {entry.name} are no longer there",
            where=entry.weights,
            hint=f"Put them back, or remove the entry: edgepeft models remove {entry.name}",
        )
    if entry.kind == "folder":
        from edgepeft.models.headers import weight_files

        if fingerprint_files(weight_files(weights)) != entry.fingerprint:
            raise BadInput(
                f"the weights of {entry.name} have changed since it was added", where=entry.weights, hint=again
            )
    elif sum(path.stat().st_size for path in files) != entry.weights_bytes:
        raise BadInput(f"the stored weights of {entry.name} are damaged", where=entry.weights, hint=again)


def _add_folder(source: Path, name: str | None, copy: bool, progress: Progress | None) -> ModelEntry:
    contents = inspect_folder(source)
    fingerprint = fingerprint_files(contents.files, progress)
    chosen = _free_name(name or default_name(source), fingerprint, fixed=name is not None)
    with _locked(chosen):
        existing = _read_entry(home().models / chosen)
        kind: Kind = "copy" if copy or (existing is not None and existing.kind == "copy") else "folder"
        if (
            existing is not None
            and (existing.kind, existing.source) == (kind, str(source))
            and not small_files_changed(source, Path(existing.folder))
        ):
            return existing
        with _work_folder(chosen) as work:
            try:
                notes = contents.notes + copy_small_files(contents, work, progress) + _template_notes(work)
            except BadInput as error:
                # The folder that the user knows is named, not our copy of its small files.
                where = error.where.replace(str(work), str(source))
                raise BadInput(error.what, where=where, hint=error.hint) from error
            if kind == "copy":
                _copy_weights(contents, work, progress)
            entry = ModelEntry(
                name=chosen,
                kind=kind,
                folder=str(home().models / chosen),
                weights=str(home().models / chosen if kind == "copy" else source),
                source=str(source),
                fingerprint=fingerprint,
                shape=contents.shape,
                stored_as=contents.stored_as,
                weights_bytes=contents.weights_bytes,
                licence=contents.licence,
                notes=notes,
                added=_now(),
            )
            _publish(work, entry)
    return entry


def _add_gguf(file: Path, name: str, kind: Kind, progress: Progress | None, *, fixed_name: bool) -> ModelEntry:
    check_convertible(file)
    fingerprint = fingerprint_files([file], progress)
    chosen = _free_name(name, fingerprint, fixed=fixed_name)
    with _locked(chosen):
        existing = _read_entry(home().models / chosen)
        if existing is not None and (Path(existing.weights) / "model.safetensors").is_file():
            return existing
        _require_space(home().models, min(_BF16_FROM_GGUF * file.stat().st_size, 3 * file.stat().st_size))
        with _work_folder(chosen) as work:
            converted = convert("gguf", file, work, progress)
            if kind == "embedded":
                _advise_sampling(work)
            contents = inspect_folder(work)
            entry = ModelEntry(
                name=chosen,
                kind=kind,
                folder=str(home().models / chosen),
                weights=str(home().models / chosen),
                source=str(file),
                fingerprint=fingerprint,
                shape=contents.shape,
                stored_as=contents.stored_as,
                weights_bytes=contents.weights_bytes,
                licence=converted.licence or (EMBEDDED_LICENCE if kind == "embedded" else None),
                notes=contents.notes + converted.notes + _template_notes(work),
                added=_now(),
            )
            _publish(work, entry)
    return entry


def _advise_sampling(folder: Path) -> None:
    path = folder / "generation_config.json"
    advised = msgspec.json.decode(path.read_bytes()) | ADVISED_SAMPLING
    path.write_bytes(msgspec.json.format(msgspec.json.encode(advised), indent=2) + b"\n")


def _template_notes(folder: Path) -> tuple[str, ...]:
    return () if template_text(folder) is not None else ("it has no chat template",)


def _copy_weights(contents: FolderContents, folder: Path, progress: Progress | None) -> None:
    _require_space(folder, contents.weights_bytes)
    done = 0
    for file in contents.files:
        target = folder / file.name
        with disk_errors(target), file.open("rb") as reading, target.open("wb") as writing:
            while block := reading.read(8 * MIB):
                writing.write(block)
                done += len(block)
                if progress is not None:
                    progress("copying", done / max(1, contents.weights_bytes))
    index = contents.path / "model.safetensors.index.json"
    if index.is_file():
        shutil.copy2(index, folder / index.name)


def _require_space(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    if free < needed_bytes + _SPARE_BYTES:
        raise DiskProblem(
            f"about {format_bytes(needed_bytes)} are needed here, {format_bytes(free)} are free",
            where=str(folder),
            hint="Free some space, or set EDGEPEFT_HOME to another disk",
        )


def _free_name(wanted: str, fingerprint: str, *, fixed: bool) -> str:
    """`wanted`, or with a number behind it when another base has that name.

    Raises:
        BadInput: the user chose the name, and another base has it.
    """
    name, number = wanted, 1
    while (taken := _read_entry(home().models / name)) is not None and taken.fingerprint != fingerprint:
        if fixed:
            raise BadInput(
                f"another model is called {wanted}",
                where="--name",
                hint=f"Choose another name, or remove that one: edgepeft models remove {wanted}",
            )
        number += 1
        name = f"{wanted[:60]}-{number}"
    return name


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    """Keeps other processes from making or removing the same entry."""
    from filelock import FileLock

    root = home().models
    make_folder(root)
    with disk_errors(root), FileLock(root / f".{name}.lock"):
        yield


@contextlib.contextmanager
def _work_folder(name: str) -> Iterator[Path]:
    """A hidden folder for the making of `name`; under its lock a folder already there is the rest of a crash."""
    work = home().models / f".{name}.partial"
    with disk_errors(work):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _publish(work: Path, entry: ModelEntry) -> None:
    write_atomic(work / _ENTRY, json.dumps(msgspec.to_builtins(entry), indent=2, ensure_ascii=False) + "\n")
    final = Path(entry.folder)
    replaced = final.with_name(f".{entry.name}.removed")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    work.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)


def _read_entry(folder: Path) -> ModelEntry | None:
    try:
        entry = msgspec.json.decode((folder / _ENTRY).read_bytes(), type=ModelEntry)
    except (OSError, msgspec.MsgspecError):
        return None
    # The store may have been moved as a whole.
    here = str(folder)
    return msgspec.structs.replace(
        entry, name=folder.name, folder=here, weights=entry.weights if entry.kind == "folder" else here
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
