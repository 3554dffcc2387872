"""A data file as rows: one mapping per record, whatever the container, each with the line on which it begins."""

from __future__ import annotations

import codecs
import csv
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from edgepeft.data.json_values import JsonValues, describe_json, describe_undecodable
from edgepeft.errors import BadInput

Container = Literal["json", "jsonl", "csv", "parquet"]
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_SNIFF_BYTES = 1 << 16
_MAX_FIELD_CHARS = 64 << 20
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


class Row(NamedTuple):
    """One record as the file has it, or what was found in its place."""

    line: int
    """Line of the file on which it begins; in parquet the row. Counted from 1."""
    fields: Mapping[str, Any]
    """Column → value; empty when `why` is set."""
    why: str
    """What is wrong with it, else empty."""
    size: int
    """Characters it takes in the file; 0 when that is not known."""
    fatal: bool = False
    """Whether nothing after it can be read."""


class RowReader:
    """Iterates over the rows of one file.

    Raises:
        BadInput: the file is missing, empty, unreadable, a folder, or of an unknown kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.total_bytes = check_file(path)
        self.bytes_read = 0
        """Bytes taken from the file so far, for progress."""
        with _readable(path), path.open("rb") as file:
            head = file.read(_SNIFF_BYTES)
        self.encoding = _encoding(head, path)
        self.container: Container = _container(head, self.encoding, path)
        self.unit = "row" if self.container == "parquet" else "line"
        self.columns: tuple[str, ...] = ()
        """The header's columns; empty for JSON, where each record has its own."""
        if self.container == "csv":
            self._delimiter, self.columns = self._read_header()
        elif self.container == "parquet":
            self.columns = self._parquet_columns()

    def __iter__(self) -> Iterator[Row]:
        with _readable(self.path):
            if self.container == "json":
                yield from self._json_rows()
            elif self.container == "jsonl":
                yield from self._jsonl_rows()
            elif self.container == "csv":
                yield from self._csv_rows()
            else:
                yield from self._parquet_rows()
        self.bytes_read = self.total_bytes

    def _json_rows(self) -> Iterator[Row]:
        with self.path.open("rb") as file:
            values = JsonValues(file, self.encoding)
            for value in values:
                self.bytes_read = values.bytes_read
                yield _row(value.line, value.value, value.why, value.size, value.fatal)

    def _jsonl_rows(self) -> Iterator[Row]:
        decoder = json.JSONDecoder()
        with self.path.open("rb") as file:
            for line, text, why, ended in self._lines(file):
                stripped = text.strip()
                if why:
                    yield Row(line, {}, why, len(text))
                elif stripped:
                    try:
                        value = decoder.decode(stripped)
                    except json.JSONDecodeError as error:
                        # Only the last line can lack its end; there a cut is likelier than a slip.
                        cut = not ended and (error.msg.startswith("Unterminated") or error.pos >= len(stripped) - 1)
                        found = (
                            "the file ends inside this record: it is truncated"
                            if cut
                            else f"not valid JSON: {describe_json(error)}"
                        )
                        yield Row(line, {}, found, len(text), cut)
                    except RecursionError:
                        yield Row(line, {}, "nested too deeply to be a record", len(text))
                    else:
                        yield _row(line, value, "", len(text), False)

    def _csv_rows(self) -> Iterator[Row]:
        csv.field_size_limit(_MAX_FIELD_CHARS)
        undecodable: dict[int, str] = {}
        with self.path.open("rb") as file:
            reader = csv.reader(self._csv_lines(file, undecodable), delimiter=self._delimiter, strict=True)
            next(reader)
            while True:
                line = reader.line_num + 1
                try:
                    fields = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    ends = "unexpected end of data" in str(error)
                    why = (
                        "the file ends inside a quoted field: a quote is missing, or it is truncated"
                        if ends
                        else f"not valid CSV: {error}"
                    )
                    yield Row(line, {}, why, 0, ends)
                    continue
                size = sum(map(len, fields))
                broken = next((undecodable.pop(at) for at in range(line, reader.line_num + 1) if at in undecodable), "")
                if broken:
                    yield Row(line, {}, broken, size)
                elif not fields:
                    continue
                elif len(fields) != len(self.columns):
                    yield Row(line, {}, f"has {_fields(len(fields))} where the header has {len(self.columns)}", size)
                else:
                    yield Row(line, dict(zip(self.columns, fields, strict=True)), "", size)

    def _csv_lines(self, file: IO[bytes], undecodable: dict[int, str]) -> Iterator[str]:
        for line, text, why, _ in self._lines(file):
            if why:
                undecodable[line] = why
            yield text

    def _parquet_rows(self) -> Iterator[Row]:
        import pyarrow
        import pyarrow.parquet

        number = 0
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=512):
                    for fields in batch.to_pylist():
                        number += 1
                        yield Row(number, fields, "", 0)
                    rows = max(1, file.metadata.num_rows)
                    self.bytes_read = self.total_bytes * number // rows
        except pyarrow.ArrowException as error:
            yield Row(number + 1, {}, f"cannot be read: {' '.join(str(error).split())}", 0, True)

    def _parquet_columns(self) -> tuple[str, ...]:
        import pyarrow
        import pyarrow.parquet

        try:
            return tuple(pyarrow.parquet.read_schema(self.path).names)
        except pyarrow.ArrowException as error:
            raise BadInput(
                f"not a readable parquet file: {' '.join(str(error).split())}",
                where=str(self.path),
                hint="Copy or export it again",
            ) from error

    def _read_header(self) -> tuple[str, tuple[str, ...]]:
        with self.path.open("rb") as file:
            first = next((text for _, text, _, _ in self._lines(file)), "")
            delimiter = max("\t,;" if self.path.suffix.lower() == ".tsv" else ",;\t", key=first.count)
            file.seek(0)
            try:
                header = next(csv.reader(self._csv_lines(file, {}), delimiter=delimiter, strict=True))
            except (csv.Error, StopIteration) as error:
                raise BadInput(f"the header is not valid CSV: {error}", where=f"{self.path}:1") from error
        columns = tuple(name.strip() for name in header)
        doubled = sorted({name for name in columns if columns.count(name) > 1})
        if doubled:
            raise BadInput(
                f"the header names {doubled[0]!r} twice",
                where=f"{self.path}:1",
                hint="Give each column a name of its own",
            )
        return delimiter, columns

    def _lines(self, file: IO[bytes]) -> Iterator[tuple[int, str, str, bool]]:
        """(line, text, what is wrong with its bytes, whether a line end closes it); lines are counted from 1."""
        if self.encoding == "utf-16":
            yield from self._utf16_lines(file)
            return
        offset = 0
        for line, raw in enumerate(file, 1):
            why = ""
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                why = describe_undecodable(error, offset + error.start)
                text = raw.decode("utf-8", errors="replace")
            offset += len(raw)
            self.bytes_read = offset
            yield line, text, why, raw.endswith(b"\n")

    def _utf16_lines(self, file: IO[bytes]) -> Iterator[tuple[int, str, str, bool]]:
        reader = codecs.getreader("utf-16")(file)
        line = 0
        try:
            for line, text in enumerate(reader, 1):
                self.bytes_read = file.tell()
                yield line, text, "", text.endswith("\n")
        except UnicodeDecodeError as error:
            yield line + 1, "", f"not UTF-16 near byte {file.tell():,} of the file", True
            del error


def check_file(path: Path) -> int:
    """The file's size in bytes.

    Raises:
        BadInput: it is missing, a folder, empty, or may not be read.
    """
    where = str(path)
    if path.is_dir():
        inside = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in SUFFIXES)
        shown = ", ".join(inside[:4]) + (f" and {len(inside) - 4} more" if len(inside) > 4 else "")
        hint = f"Name one of its files: {shown}" if inside else "Name a json, jsonl, csv or parquet file"
        raise BadInput("this is a folder, not a data file", where=where, hint=hint)
    if not path.exists():
        raise BadInput("no such file", where=where, hint="Check the path")
    if not path.is_file():
        raise BadInput("this is not a regular file", where=where, hint="Save its contents to a file first")
    if not os.access(path, os.R_OK):
        raise BadInput("no permission to read this file", where=where, hint="Change its permissions")
    size = path.stat().st_size
    if size == 0:
        raise BadInput(
            "the file is empty", where=where, hint="It should hold one record or more; see `edgepeft data check --help`"
        )
    return size


class _readable:  # noqa: N801 - a context manager reads as a verb
    """Turns the system's errors about reading `path` into `BadInput`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise BadInput(
                f"cannot be read: {error.strerror or error}",
                where=str(self.path),
                hint="Check the disk and the permissions",
            ) from error


def _fields(count: int) -> str:
    return "1 field" if count == 1 else f"{count} fields"


def _row(line: int, value: Any, why: str, size: int, fatal: bool) -> Row:
    if why:
        return Row(line, {}, why, size, fatal)
    if not isinstance(value, dict):
        return Row(line, {}, f"is {_kind(value)} where a record (an object with named fields) is expected", size)
    return Row(line, value, "", size)


def _kind(value: Any) -> str:
    names = {
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


def _encoding(head: bytes, path: Path) -> str:
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    if b"\0" in head and not head.startswith(b"PAR1"):
        wide = head[1:200:2].count(0) > 50 or head[0:200:2].count(0) > 50
        what = "this looks like UTF-16 without a mark at its beginning" if wide else "this is not a text file"
        hint = "Convert it to UTF-8" if wide else "Give json, jsonl, csv, tsv or parquet"
        raise BadInput(what, where=str(path), hint=hint)
    return "utf-8"


def _container(head: bytes, encoding: str, path: Path) -> Container:
    suffix = path.suffix.lower()
    if head.startswith(b"PAR1") or suffix == ".parquet":
        return "parquet"
    text = head.decode(encoding, errors="replace").lstrip("\ufeff \t\r\n")
    if not text:
        if path.stat().st_size <= _SNIFF_BYTES:
            raise BadInput(
                "the file holds nothing but blanks", where=str(path), hint="It should hold one record or more"
            )
        raise BadInput("the file begins with nothing but blanks", where=str(path), hint="Remove them")
    if suffix in (".csv", ".tsv"):
        return "csv"
    if text.startswith("["):
        # A line that is a whole list would be a strange record; a file that begins so is one list.
        return "json"
    if text.startswith("{"):
        first = text.split("\n", 1)[0].strip()
        return "jsonl" if suffix in (".jsonl", ".ndjson") or _is_object(first) else "json"
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    if suffix == ".json":
        return "json"
    raise BadInput(
        "unknown kind of file",
        where=str(path),
        hint='Give json, jsonl, csv, tsv or parquet; for plain text write one {"text": "…"} a line into a .jsonl file',
    )


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (json.JSONDecodeError, RecursionError):
        return False
