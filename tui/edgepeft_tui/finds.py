"""What a run can be planned with: models here and elsewhere on this disk, data files, and what is in one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from edgepeft.errors import EdgepeftError
from edgepeft.units import format_bytes, format_count, format_gib

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_RECENT_RUNS = 12
_MOST_FILES = 200
_PREVIEWED = 50
_LONGEST_TOKENS = 2000
"""Tokens of one sample that are drawn."""


class Found(msgspec.Struct, frozen=True):
    """Something that can be chosen."""

    key: str
    """What is chosen: a name or a path."""
    note: str = ""
    usable: bool = True


class DrawnPiece(msgspec.Struct, frozen=True):
    """Consecutive tokens of one kind."""

    text: str
    trained: bool
    special: bool


class DrawnSample(msgspec.Struct, frozen=True):
    """One sample as the model reads it."""

    title: str
    pieces: tuple[DrawnPiece, ...] = ()
    tokens: int = 0
    trained: int = 0
    trouble: str = ""
    """Why the record cannot be used."""


class DemoChoice(msgspec.Struct, frozen=True):
    """The demo's model, data and pinned options."""

    model: str
    data: str
    values: dict[str, str]
    name: str


def store_models() -> tuple[Found, ...]:
    """Models in the store, and the embedded one where it was not used yet."""
    from edgepeft.models.embedded import EMBEDDED, embedded_gguf
    from edgepeft.models.store import list_models

    found = [
        Found(
            entry.name,
            f"{format_count(entry.shape.parameters)}  {entry.stored_as} {format_gib(entry.weights_bytes)}",
        )
        for entry in list_models()
    ]
    if EMBEDDED not in [model.key for model in found]:
        try:
            embedded_gguf()
            found.append(Found(EMBEDDED, "comes with edgepeft; prepared when it is first used"))
        except EdgepeftError as error:
            found.append(Found(EMBEDDED, error.hint, usable=False))
    return tuple(found)


def scanned_models() -> tuple[Found, ...]:
    """Models that other programs left on this disk and that are not in the store."""
    from edgepeft.models.discovery import scan

    return tuple(
        Found(
            model.path,
            f"{model.name}  {format_bytes(model.size_bytes)}  {model.origin}"
            + ("" if model.usable else f"  cannot be used: {model.reason}"),
            model.usable,
        )
        for model in scan()
        if model.in_store is None
    )


def described_models() -> tuple[Found, ...]:
    """Models that profiles describe: they can be planned for, and not be trained."""
    from edgepeft.models.described import load_models

    here = {model.key for model in store_models()}
    return tuple(
        Found(profile.id, f"{format_count(profile.parameters)}  not on this disk: plan only")
        for profile in load_models().values()
        if profile.id not in here
    )


def recent_data() -> tuple[Found, ...]:
    """Data files of the newest runs, then those of the demo where they were written."""
    from edgepeft.paths import home
    from edgepeft.runs.layout import list_runs

    found: dict[str, Found] = {}
    try:
        for run in list_runs()[:_RECENT_RUNS]:
            try:
                path = run.read_plan().spec.recipe.data.path
            except EdgepeftError:
                continue
            if path and Path(path).is_file():
                found.setdefault(path, Found(path, f"used by {run.id}"))
    except EdgepeftError:
        pass
    for file in sorted((home().cache / "demo").glob("seed-*/*-train.jsonl")):
        found.setdefault(str(file), Found(str(file), "the demo's"))
    return tuple(found.values())


def files_like(typed: str) -> tuple[Found, ...]:
    """Folders and data files whose path begins as typed; of the working directory where nothing is typed."""
    path = Path(typed).expanduser() if typed else Path()
    folder, begin = (path, "") if not typed or typed.endswith(os.sep) else (path.parent, path.name)
    prefix = typed[: len(typed) - len(begin)] if begin else typed
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name.lower())
    except OSError:
        return ()
    return tuple(_files(entries, begin, prefix))[:_MOST_FILES]


def _files(entries: list[os.DirEntry[str]], begin: str, prefix: str) -> Iterator[Found]:
    for entry in entries:
        if not entry.name.lower().startswith(begin.lower()) or (entry.name.startswith(".") and not begin):
            continue
        try:
            if entry.is_dir():
                yield Found(prefix + entry.name + os.sep, "folder")
            elif entry.name.lower().endswith(DATA_SUFFIXES):
                yield Found(prefix + entry.name, format_bytes(entry.stat().st_size))
        except OSError:
            continue


def demo_choice() -> DemoChoice:
    """What the demo trains; its files are written where they are missing."""
    from edgepeft.demo.tour import ADAPTER, demo_files, pinned_options
    from edgepeft.models.embedded import EMBEDDED
    from edgepeft.plan.options import spelt_options

    train, held_out = demo_files(0)
    return DemoChoice(EMBEDDED, str(train), spelt_options(pinned_options(held_out, 0)), ADAPTER)


def drawn_samples(model: str, data: str, values: dict[str, str]) -> tuple[DrawnSample, ...]:
    """The first records of a file as the model reads them, token by token.

    Raises:
        EdgepeftError: the file, the model or an option cannot be used; a model that is only described has no tokens.
    """
    from edgepeft.data.conversation import RecordError
    from edgepeft.data.prepare import describe_data, load_template
    from edgepeft.data.preview import preview_record
    from edgepeft.data.records import BadRecord, RecordReader
    from edgepeft.data.tokens import Tokenizer
    from edgepeft.models.store import ensure_model
    from edgepeft.plan.build import parse_map
    from edgepeft.plan.options import typed_options

    typed = typed_options(values)
    reference = describe_data(
        Path(data).expanduser(),
        format=typed.get("format"),
        columns=parse_map(typed.get("map", [])),
        system=typed.get("system"),
        train_on=typed.get("train_on", "assistant"),
        template=typed.get("template"),
    )
    folder = Path(ensure_model(model).folder)
    tokenizer, template = Tokenizer.load(folder), load_template(reference, folder)
    reader = RecordReader(Path(reference.path), reference.format, reference.columns)
    drawn: list[DrawnSample] = []
    for number, record in enumerate(reader, 1):
        title = f"record {number}, {reader.detection.unit} {record.line}"
        try:
            if isinstance(record, BadRecord):
                raise RecordError(record.why)
            samples = preview_record(record, tokenizer, template, reference.train_on, reference.system)
        except RecordError as refusal:
            drawn.append(DrawnSample(title, trouble=str(refusal)))
        else:
            for sample in samples:
                pieces: list[DrawnPiece] = []
                for piece in sample.pieces[:_LONGEST_TOKENS]:
                    last = pieces[-1] if pieces else None
                    if last is not None and (last.trained, last.special) == (piece.trained, piece.special):
                        pieces[-1] = msgspec.structs.replace(last, text=last.text + piece.text)
                    else:
                        pieces.append(DrawnPiece(piece.text, piece.trained, piece.special))
                drawn.append(DrawnSample(title, tuple(pieces), sample.tokens, sample.trained))
        if len(drawn) >= _PREVIEWED:
            break
    return tuple(drawn)
