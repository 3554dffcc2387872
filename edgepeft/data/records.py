"""Rows become records: conversations or plain text, in one shape for every format. Nothing here needs a model.

Formats, as fields of a row:
    alpaca              instruction, output; optional input, system, history (pairs)
    sharegpt            conversations: [{from, value}, …]; optional system, tools
    messages            messages: [{role, content, tool_calls?}, …]; optional tools
    prompt-completion   prompt, completion (or response), question and answer; texts, or lists of messages
    text                text
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from edgepeft.data.conversation import (
    EmptyRecordError,
    Message,
    RecordError,
    alpaca,
    messages_form,
    prompt_completion,
    read_tools,
    sharegpt,
)
from edgepeft.data.rows import Row, RowReader
from edgepeft.errors import BadInput, UsageError

Format = Literal["alpaca", "sharegpt", "messages", "prompt-completion", "text"]
FORMATS: tuple[Format, ...] = get_args(Format)
FIELDS: dict[Format, tuple[str, ...]] = {
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "sharegpt": ("conversations", "system", "tools"),
    "messages": ("messages", "tools"),
    "prompt-completion": ("prompt", "completion", "system"),
    "text": ("text",),
}
"""What `--map` can name, for each format."""
_DETECTION_ROWS = 500
LARGE_RECORD_CHARS = 1_000_000
_ALIASES = (("prompt", "response"), ("question", "answer"))


class Record(msgspec.Struct, frozen=True):
    """One usable record."""

    line: int
    """Line (in parquet: row) of the file on which it begins."""
    messages: tuple[Message, ...] = ()
    """The conversation, in the roles system, user, assistant and tool; empty for plain text."""
    tools: tuple[dict[str, Any], ...] = ()
    """JSON schemas of the functions that the conversation may call."""
    text: str | None = None
    """Plain text; None for conversations."""
    context_answers: int = 0
    """So many assistant turns at the beginning are context only and carry no loss."""
    size: int = 0
    """Characters it takes in the file; 0 when that is not known."""


class BadRecord(msgspec.Struct, frozen=True):
    """One record that cannot be used."""

    line: int
    """Line (in parquet: row) of the file on which it begins."""
    why: str
    """What is wrong with it, as a clause."""
    fatal: bool = False
    """Whether nothing after it can be read: the file is truncated or broken."""
    empty: bool = False
    """Whether it lacks what would be asked, or what would be learned."""


class Detection(msgspec.Struct, frozen=True):
    """What the first records of a file look like."""

    format: Format
    container: str
    """json, jsonl, csv or parquet."""
    unit: str
    """What `line` counts: line or row."""
    columns: tuple[str, ...]
    """Columns or fields seen."""
    others: dict[str, int]
    """Records of other formats among the first ones."""


class RecordReader:
    """Iterates over the records of one file, good and bad."""

    def __init__(self, path: Path, format: str | None = None, columns: Mapping[str, str] | None = None) -> None:
        self.columns = dict(columns or {})
        self.detection = detect_format(path, format, self.columns)
        self.format = self.detection.format
        self._rows = RowReader(path)

    @property
    def bytes_read(self) -> int:
        """Bytes taken from the file so far."""
        return self._rows.bytes_read

    @property
    def total_bytes(self) -> int:
        """Size of the file."""
        return self._rows.total_bytes

    def __iter__(self) -> Iterator[Record | BadRecord]:
        for row in self._rows:
            yield self._record(row)

    def _record(self, row: Row) -> Record | BadRecord:
        if row.why:
            return BadRecord(row.line, row.why, row.fatal)
        fields = _renamed(row.fields, self.columns)
        found = _format_of(fields)
        if found != self.format and not _has_fields(fields, self.format):
            if found is not None:
                return BadRecord(row.line, f"looks like {found}, while the file is {self.format}: formats are mixed")
            missing = [field for field in _REQUIRED[self.format] if field not in fields]
            return BadRecord(
                row.line, f"lacks {' and '.join(map(repr, missing)) or 'usable fields'}; it has {_listed(row.fields)}"
            )
        try:
            return _to_record(fields, self.format, row.line, row.size)
        except RecordError as refusal:
            return BadRecord(row.line, str(refusal), empty=isinstance(refusal, EmptyRecordError))


def read_records(
    path: Path, format: str | None = None, columns: Mapping[str, str] | None = None
) -> Iterator[Record | BadRecord]:
    """The records of a file in order, good and bad; the file is read as a stream.

    Args:
        path: a json, jsonl, csv, tsv or parquet file.
        format: one of `FORMATS`; detected when None.
        columns: the format's field → the file's column, where they differ.

    Raises:
        BadInput: the file cannot be read, its format cannot be told, or a column does not exist.
        UsageError: a field that the format does not have is mapped.
    """
    return iter(RecordReader(path, format, columns))


def detect_format(path: Path, format: str | None = None, columns: Mapping[str, str] | None = None) -> Detection:
    """Tells the format from the first 500 records, or checks that a given one can be meant.

    Raises:
        BadInput: the file cannot be read, no record is of a known format, or a mapped column does not exist.
        UsageError: an unknown format, or a mapped field that the format does not have.
    """
    given = next((known for known in FORMATS if known == format), None)
    if format is not None and given is None:
        raise UsageError(f"unknown format {format!r}", where="--format", hint="Known: " + ", ".join(FORMATS))
    columns = dict(columns or {})
    rows = RowReader(path)
    seen: Counter[str] = Counter()
    names: dict[str, None] = dict.fromkeys(rows.columns)
    first_bad: Row | None = None
    usable = 0
    for row in islice(rows, _DETECTION_ROWS):
        if row.why:
            first_bad = first_bad or row
            continue
        usable += 1
        names.update(dict.fromkeys(row.fields))
        found = _format_of(_renamed(row.fields, columns))
        if found is not None:
            seen[found] += 1
    _check_columns(path, given, columns, tuple(names), bool(usable or rows.columns))
    if given is None and not seen:
        if usable == 0 and first_bad is not None:
            raise BadInput(
                f"no usable record: {first_bad.why}",
                where=f"{path}:{first_bad.line}",
                hint="Convert the file to UTF-8"
                if first_bad.why.startswith("not UTF-8")
                else "Every record should be an object with named fields",
            )
        if usable == 0:
            raise BadInput("no records in this file", where=str(path), hint="It should hold one record or more")
        raise BadInput(
            f"no known format: the records have {_listed(names)}",
            where=str(path),
            hint="Say which column is which, such as --map prompt=COLUMN --map completion=COLUMN, or --map text=COLUMN",
        )
    chosen: Format = given if given is not None else max(FORMATS, key=lambda known: seen[known])
    others = {name: count for name, count in seen.items() if name != chosen}
    return Detection(chosen, rows.container, rows.unit, tuple(names), others)


def unread_columns(detection: Detection, columns: Mapping[str, str]) -> tuple[str, ...]:
    """Columns of a table that its format has no use for; JSON records may carry what they like."""
    if detection.container not in ("csv", "parquet"):
        return ()
    aliases = {name for pair in _ALIASES for name in pair} if detection.format == "prompt-completion" else set()
    read = {*FIELDS[detection.format], *columns.values(), *aliases} - set(columns)
    return tuple(name for name in detection.columns if name not in read | set(columns.values()))


_REQUIRED: dict[Format, tuple[str, ...]] = {
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}


def _check_columns(
    path: Path, format: Format | None, columns: Mapping[str, str], present: tuple[str, ...], known: bool
) -> None:
    allowed = (
        FIELDS[format] if format else tuple(dict.fromkeys(field for fields in FIELDS.values() for field in fields))
    )
    for field, column in columns.items():
        if field not in allowed:
            raise UsageError(
                f"{format} has no field {field!r}" if format else f"no format has a field {field!r}",
                where=f"--map {field}={column}",
                hint="Fields: " + ", ".join(allowed),
            )
        if known and column not in present:
            raise BadInput(
                f"there is no column {column!r}", where=str(path), hint=f"The columns are {_listed(present)}"
            )


def _renamed(fields: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under the format's names; a mapped column no longer counts under its own."""
    if not columns:
        return dict(fields)
    taken = set(columns.values())
    renamed = {name: value for name, value in fields.items() if name not in taken and name not in columns}
    renamed.update({field: fields[column] for field, column in columns.items() if column in fields})
    return renamed


def _format_of(fields: Mapping[str, Any]) -> Format | None:
    turns = fields.get("messages")
    if isinstance(turns, list):
        return "messages"
    for key in ("conversations", "conversation"):
        if isinstance(fields.get(key), list):
            return "sharegpt"
    for format in ("alpaca", "prompt-completion"):
        if _has_fields(fields, format):
            return format
    return "text" if isinstance(fields.get("text"), str) else None


def _has_fields(fields: Mapping[str, Any], format: Format) -> bool:
    if format == "prompt-completion":
        return ("prompt" in fields and "completion" in fields) or any(a in fields and b in fields for a, b in _ALIASES)
    if format == "sharegpt":
        return "conversations" in fields or "conversation" in fields
    return all(field in fields for field in _REQUIRED[format])


def _to_record(fields: Mapping[str, Any], format: Format, line: int, size: int) -> Record:
    """One row of a known format as a record.

    Raises:
        RecordError: with the reason, as a clause.
    """
    if format == "text":
        text = fields["text"]
        if not isinstance(text, str):
            raise RecordError(f"'text' is {type(text).__name__}, not a text")
        if not text.strip():
            raise EmptyRecordError("'text' is empty")
        _check_encodable(text)
        return Record(line, text=text, size=size)
    context = 0
    if format == "alpaca":
        messages = alpaca(fields)
    elif format == "sharegpt":
        messages = sharegpt(fields)
    elif format == "messages":
        messages = messages_form(fields["messages"])
    else:
        for prompt, completion in (("prompt", "completion"), *_ALIASES):
            if prompt in fields and completion in fields:
                break
        messages, context = prompt_completion(fields, prompt, completion)
    last = max((at for at, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    if last < context:
        raise EmptyRecordError("has no assistant turn: there is nothing to learn")
    for message in messages:
        _check_encodable(message.get("content", ""))
    # What follows the last answer is never answered; it would only cost memory.
    context_answers = sum(message["role"] == "assistant" for message in messages[:context])
    return Record(
        line, tuple(messages[: last + 1]), tuple(read_tools(fields.get("tools"))), None, context_answers, size
    )


def _check_encodable(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError(
            f"holds half of a character (\\u{ord(text[error.start]):04x} without its other half)"
        ) from error


def _listed(names: Mapping[str, Any] | tuple[str, ...]) -> str:
    shown = list(names)
    text = ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")
    return text or "no fields"
