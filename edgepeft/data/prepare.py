"""From a data file to tokenized samples: read, rendered, masked, cached, and split into training and held out."""

from __future__ import annotations

import datetime
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgepeft.data.encode import Rendered, tokenize
from edgepeft.data.reading import RenderedFile, TokenCounts, check_usable, reading_notes
from edgepeft.data.records import Format, detect_format
from edgepeft.data.rows import check_file
from edgepeft.data.schedule import split_held_out
from edgepeft.data.template import ChatTemplate
from edgepeft.data.tokens import Tokenizer, untrained_tokens
from edgepeft.errors import BadInput
from edgepeft.paths import atomic_path, disk_errors, home, write_atomic
from edgepeft.spec import DataRef, TrainOn

if TYPE_CHECKING:
    from edgepeft.data.token_table import Flags, Indices, TokenFile, TokenTable

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""
_SCHEMA_VERSION = 1
"""Raised whenever the same inputs would give other tokens or masks; old cache entries are then not found."""
_SPLIT_SEED = 0
_BATCH_RECORDS = 256
_BATCH_CHARS = 1 << 20
_PUT_BACK = "Put the planned file back, or train anew with the file as it is now"


class PreparedData(msgspec.Struct, frozen=True):
    """Tokenized samples, ready to be scheduled."""

    train: TokenTable
    held_out: TokenTable
    notes: tuple[str, ...]
    """What the user should know, as sentences without a full stop."""
    format: Format
    counts: TokenCounts
    """Of the training file, before the split."""
    key: str = ""
    """Equal for equal files, readings, tokenizers and chat templates."""


def describe_data(
    path: Path,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    train_on: TrainOn = "assistant",
    eval_path: Path | None = None,
    eval_fraction: float = 0.05,
    system: str | None = None,
    template: str | None = None,
    day: datetime.date | None = None,
) -> DataRef:
    """Says which data is meant and how it is read: detects the format and takes the file's fingerprint.

    Args:
        template: `chatml`, `plain` or a file, instead of the model's own chat template.
        day: what a template that inserts today's date gets; None is today.

    Raises:
        BadInput: a file cannot be read, or its format cannot be told.
        UsageError: an option cannot be meant.
    """
    if not 0 <= eval_fraction < 1:
        raise BadInput(
            f"the held-out share {eval_fraction} is outside [0, 1)",
            where="--eval-fraction",
            hint="Give for example 0.05",
        )
    detection = detect_format(path, format, columns)
    if eval_path is not None:
        detect_format(eval_path, detection.format, columns)
    if template is not None and template not in ("chatml", "plain"):
        template = str(Path(template).absolute())
    return DataRef(
        path=str(path.absolute()),
        fingerprint=fingerprint_file(path),
        format=detection.format,
        columns=dict(columns or {}),
        train_on=train_on,
        system=system,
        template=template,
        day=(day or datetime.date.today()).isoformat(),
        eval_path=str(eval_path.absolute()) if eval_path else None,
        eval_fingerprint=fingerprint_file(eval_path) if eval_path else None,
        eval_fraction=eval_fraction,
    )


def load_template(data: DataRef, model_folder: Path) -> ChatTemplate | None:
    """The template that `data` is rendered with, its date frozen; None for plain text.

    Raises:
        BadInput: the model has none and none is given.
    """
    if data.format == "text":
        return None
    template = ChatTemplate.load(model_folder, data.template)
    day = datetime.date.fromisoformat(data.day) if data.day else datetime.date.today()
    return template.freeze_date(day) if template.uses_date else template


def prepare(data: DataRef, model_folder: Path, *, progress: Progress | None = None) -> PreparedData:
    """The tokens of `data` for the model in `model_folder`, from the cache or made now.

    Records are read as a stream and tokens written to a memory-mapped file: memory does not grow with the file.

    Raises:
        BadInput: a file is missing, changed or truncated; no record is usable; nothing, or no end of an answer, would
            be trained; the model has no tokenizer or no chat template.
        DiskProblem: the cache cannot be written.
    """
    import numpy as np

    from edgepeft.data.token_table import TokenTable

    tokenizer = Tokenizer.load(model_folder)
    template = load_template(data, model_folder)
    file, counts = _tokens(data, data.path, data.fingerprint, tokenizer, template, progress)
    _check_trained(counts, data, tokenizer, template)
    notes = reading_notes(data.path, counts) + template_notes(data, tokenizer, template)
    if data.eval_path and data.eval_fingerprint:
        held, held_counts = _tokens(data, data.eval_path, data.eval_fingerprint, tokenizer, template, progress)
        notes += reading_notes(data.eval_path, held_counts)
        train = TokenTable(file, np.flatnonzero(file.trained > 0))
        held_out = TokenTable(held, np.flatnonzero(held.trained > 0))
    else:
        # Equal samples, and all samples of one record, stay on one side: what is held out is really new.
        usable = np.flatnonzero(file.trained > 0)
        in_train = split_samples(file.contents[usable], file.lines[usable], data.eval_fraction)
        train, held_out = TokenTable(file, usable[in_train]), TokenTable(file, usable[~in_train])
    key = _cache_key(data, data.fingerprint, tokenizer, template)
    return PreparedData(train, held_out, tuple(notes), counts.format, counts, key)


def check_unchanged(data: DataRef, *, forced: bool = False, hint: str = "") -> list[str]:
    """Compares the files with the fingerprints that were taken of them.

    A run learns from the content that it was planned with, or not at all: its checkpoints belong to that content. So
    where a file is another one by now, only its tokens in the cache, which are those of the planned content, can be
    gone on with. That is exact, and done only when it is asked for: whoever changed the file may want it to count.

    Args:
        data: of the plan.
        forced: go on with the cached tokens of files that changed or are gone; `prepare` refuses when there are none.
        hint: what to do next, where it is not to put the file back or to plan anew.

    Returns:
        What is gone on with, as sentences without a full stop; empty when every file is the planned one.

    Raises:
        BadInput: a file changed or is gone, and that is not forced; it says which, and what it is for.
    """
    found: list[str] = []
    for role, path, fingerprint in (
        ("training", data.path, data.fingerprint),
        ("held-out", data.eval_path, data.eval_fingerprint),
    ):
        if path is None or fingerprint is None:
            continue
        there = Path(path).is_file()
        if there and fingerprint_file(Path(path)) == fingerprint:
            continue
        what = "has changed since the plan was made" if there else "is gone"
        if not forced:
            raise BadInput(f"the {role} file {what}", where=path, hint=hint or _PUT_BACK)
        found.append(
            f"the {role} file {path} {what}: the run goes on with the tokens of the file as it was, from the cache"
        )
    return found


def fingerprint_file(path: Path) -> str:
    """`sha256:…` of the file's bytes.

    Raises:
        BadInput: the file cannot be read.
    """
    check_file(path)
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def _tokens(
    data: DataRef,
    path: str,
    fingerprint: str,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    progress: Progress | None,
) -> tuple[TokenFile, TokenCounts]:
    import pyarrow

    from edgepeft.data.token_table import TokenFile

    key = _cache_key(data, fingerprint, tokenizer, template)
    arrow, summary = home().cache / "tokens" / f"{key}.arrow", home().cache / "tokens" / f"{key}.json"
    try:
        return TokenFile(arrow), msgspec.json.decode(summary.read_bytes(), type=TokenCounts)
    except (OSError, pyarrow.ArrowException, msgspec.DecodeError):
        # Not there, or damaged: the cache is made anew.
        counts = _build(data, Path(path), fingerprint, tokenizer, template, arrow, progress)
        write_atomic(summary, msgspec.json.encode(counts))
        return TokenFile(arrow), counts


def _build(
    data: DataRef,
    path: Path,
    fingerprint: str,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    target: Path,
    progress: Progress | None,
) -> TokenCounts:
    from edgepeft.data.token_table import TokenWriter

    if not path.is_file() or fingerprint_file(path) != fingerprint:
        what = "has changed since the plan was made" if path.is_file() else "is gone"
        raise BadInput(
            f"the file {what}, and the cache does not hold its tokens as it was", where=str(path), hint=_PUT_BACK
        )
    file = RenderedFile(path, data, template)
    stops = frozenset(tokenizer.stop_token_ids(template))
    totals: Counter[str] = Counter()
    waiting: list[Rendered] = []

    with disk_errors(target), atomic_path(target) as temporary:
        writer = TokenWriter(temporary)
        complete = False
        waiting_chars = 0

        def write_waiting() -> None:
            for sample in tokenize(waiting, tokenizer, stops):
                writer.add(sample.ids, sample.mask, sample.rendered.line)
                totals["samples"] += 1
                totals["with_loss"] += any(sample.mask)
                totals["with_end"] += not stops.isdisjoint(compress(sample.ids, sample.mask))
            waiting.clear()
            if progress is not None:
                progress(file.reader.bytes_read, file.reader.total_bytes)

        try:
            for rendered in file:
                waiting.extend(rendered)
                waiting_chars += sum(len(item.text) for item in rendered)
                if len(waiting) >= _BATCH_RECORDS or waiting_chars >= _BATCH_CHARS:
                    write_waiting()
                    waiting_chars = 0
            write_waiting()
            complete = True
        finally:
            writer.close(keep=complete)
    return file.counts(samples=totals["samples"], with_loss=totals["with_loss"], with_end=totals["with_end"])


def _cache_key(data: DataRef, fingerprint: str, tokenizer: Tokenizer, template: ChatTemplate | None) -> str:
    parts = {
        "schema": _SCHEMA_VERSION,
        "data": fingerprint,
        "suffix": Path(data.path).suffix.lower(),
        "format": data.format,
        "columns": data.columns,
        "train_on": data.train_on,
        "system": data.system,
        "tokenizer": tokenizer.fingerprint,
        "stops": sorted(tokenizer.stop_token_ids(template)),
        "eos": tokenizer.eos_id,
        "template": template.key if template else None,
    }
    return hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()[:40]


def _check_trained(counts: TokenCounts, data: DataRef, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
    check_usable(counts, data)
    if counts.with_end == 0:
        stops = ", ".join(tokenizer.decode([token]) for token in tokenizer.stop_token_ids(template)) or "none is known"
        raise BadInput(
            f"the token that ends an answer would never be trained ({stops}): the adapter would never stop",
            where=f"chat template {template.name!r}" if template else data.path,
            hint="Give a template that writes it after each answer with --template FILE, or try --template chatml",
        )


def template_notes(data: DataRef, tokenizer: Tokenizer, template: ChatTemplate | None) -> list[str]:
    """What the user should know about the chat template, as sentences without a full stop."""
    if template is None:
        return []
    notes = [f"using the {template.name} template instead of the model's own"] if template.name != "model" else []
    if template.day is not None:
        notes.append(f"the chat template inserts today's date: it is frozen to {template.day.isoformat()}")
    return notes + untrained_tokens(tokenizer, template)


def split_samples(contents: Indices, lines: Indices, fraction: float) -> Flags:
    """Which samples are trained on, bool [n]; the others are held out.

    Args:
        contents: equal for samples of equal content, int64 [n].
        lines: of the record that each comes from, int64 [n].
        fraction: share of the records to hold out.
    """
    import numpy as np

    groups = _groups(contents, lines)
    train_groups, _ = split_held_out(int(groups.max()) + 1, fraction, _SPLIT_SEED)
    return np.isin(groups, np.asarray(train_groups, np.int64))


def _groups(contents: Indices, lines: Indices) -> Indices:
    """A group number for each sample, 0 … n-1 without gaps, in order of first appearance: equal for all samples of one
    record and for samples of equal content (a record counts as equal to another when its first samples are).
    """
    import numpy as np

    _, first_of_line, record = np.unique(lines, return_index=True, return_inverse=True)
    _, first, group = np.unique(contents[first_of_line], return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    return rank[group][record]
