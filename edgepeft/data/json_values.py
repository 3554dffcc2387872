"""Reading JSON values one by one from a file that may be larger than memory, with the line on which each begins."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

_CHUNK_BYTES = 1 << 20
MAX_RECORD_CHARS = 64 << 20
"""A record that has not ended by then is taken for one with a missing quote or bracket."""
_SPACE = re.compile(r"[ \t\r\n]*")
_STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]]', re.DOTALL)
WRAPPERS = ("data", "train", "rows", "records", "examples", "samples", "items")
"""Keys under which a file of one object may hold its list of records."""


class Value(NamedTuple):
    """One JSON value of a file, or what was found in its place."""

    line: int
    """Line on which it begins, counted from 1."""
    value: Any
    """The decoded value; None when `why` is set."""
    why: str
    """What is wrong with it, else empty."""
    size: int
    """Characters it takes in the file."""
    fatal: bool
    """Whether nothing after it can be read."""


class _Text:
    """A window over a decoded file: grows at its end on demand, and is cut at its beginning."""

    def __init__(self, file: IO[bytes], encoding: str) -> None:
        self.file = file
        self.decoder = codecs.getincrementaldecoder(encoding)()
        self.text = ""
        self.at = 0
        self.line = 1
        self.ended = False
        self.broken = ""
        self.bytes_read = 0
        self.wanted = _CHUNK_BYTES

    def grow(self) -> bool:
        """Appends more text; False at the end of the file."""
        if self.ended:
            return False
        chunk = self.file.read(self.wanted)
        # Doubling keeps the repeated attempts at one large value linear in its size.
        self.wanted = min(self.wanted * 2, 32 * _CHUNK_BYTES)
        waiting = len(self.decoder.getstate()[0])
        try:
            self.text += self.decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            offset = self.bytes_read - waiting + error.start
            self.broken = describe_undecodable(error, offset)
            if "utf-8" in error.encoding.replace("_", "-").lower():
                self.text += error.object[: error.start].decode("utf-8")
            self.ended = True
            return False
        self.bytes_read += len(chunk)
        self.ended = not chunk
        return not self.ended

    def skip_to(self, position: int) -> None:
        """Moves forward, counting lines, and forgets what lies behind once that is large."""
        self.line += self.text.count("\n", self.at, position)
        self.at = position
        self.wanted = _CHUNK_BYTES
        if self.at > _CHUNK_BYTES:
            self.text = self.text[self.at :]
            self.at = 0

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            match = _SPACE.match(self.text, self.at)
            assert match is not None
            self.skip_to(match.end())
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.grow() and self.at >= len(self.text):
                return ""


def describe_undecodable(error: UnicodeDecodeError, offset: int) -> str:
    """One clause about bytes that are no text in the file's encoding."""
    encoding = error.encoding.upper().replace("_", "-")
    return f"not {encoding}: byte 0x{error.object[error.start]:02x} at offset {offset:,} of the file"


class JsonValues:
    """The records of a JSON file: an array, an object that wraps one, or objects one after the other."""

    def __init__(self, file: IO[bytes], encoding: str) -> None:
        self._text = _Text(file, encoding)
        self._json = json.JSONDecoder()

    @property
    def bytes_read(self) -> int:
        """Bytes taken from the file so far."""
        return self._text.bytes_read

    def __iter__(self) -> Iterator[Value]:
        text = self._text
        first = text.peek()
        if first == "[":
            text.skip_to(text.at + 1)
            fatal = False
            for value in self._array():
                fatal = value.fatal
                yield value
            if not fatal and text.peek():
                yield Value(text.line, None, "something follows after the end of the list", 0, True)
        elif first == "{" and self._enter_wrapper():
            yield from self._array()
        else:
            while text.peek():
                value = self._one()
                yield value
                if value.fatal:
                    return
            if text.broken:
                yield Value(text.line, None, text.broken, 0, True)

    def _array(self) -> Iterator[Value]:
        text = self._text
        if text.peek() == "]":
            text.skip_to(text.at + 1)
            return
        while True:
            if text.peek() == "":
                yield self._ends_early(text.line, "the file ends inside the list: it is truncated")
                return
            value = self._one()
            yield value
            if value.fatal:
                return
            following = text.peek()
            if following == ",":
                text.skip_to(text.at + 1)
            elif following == "]":
                text.skip_to(text.at + 1)
                return
            elif following == "":
                yield self._ends_early(text.line, "the file ends before the list does: it is truncated")
                return
            elif following != "{":
                yield Value(text.line, None, f"found {following!r} where the next record should begin", 0, True)
                return

    def _ends_early(self, line: int, why: str) -> Value:
        return Value(line, None, self._text.broken or why, 0, True)

    def _one(self) -> Value:
        """The value that begins here; a malformed one is stepped over as far as its brackets say."""
        text = self._text
        line = text.line
        while True:
            try:
                value, end = self._json.raw_decode(text.text, text.at)
            except RecursionError:
                return Value(line, None, "nested too deeply to be a record", 0, True)
            except json.JSONDecodeError as error:
                if len(text.text) - text.at > MAX_RECORD_CHARS:
                    return Value(
                        line,
                        None,
                        f"does not end within {MAX_RECORD_CHARS >> 20} MiB: a quote or bracket is missing",
                        0,
                        True,
                    )
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(text.text) - 6
                if cut and text.grow():
                    continue
                if cut:
                    return self._ends_early(line, "the file ends inside this record: it is truncated")
                return self._step_over(line, error)
            size = end - text.at
            text.skip_to(end)
            return Value(line, value, "", size, False)

    def _step_over(self, line: int, error: json.JSONDecodeError) -> Value:
        text = self._text
        where = line + text.text.count("\n", text.at, error.pos)
        why = f"not valid JSON: {describe_json(error)}" + (f" (line {where})" if where != line else "")
        begin = text.at
        depth, position = 0, begin
        while len(text.text) - begin <= MAX_RECORD_CHARS:
            match = _STRUCTURE.search(text.text, position)
            if match is None:
                if text.grow():
                    continue
                break
            position = match.end()
            if match[0] in ("{", "["):
                depth += 1
            elif match[0] in ("}", "]"):
                depth -= 1
            if depth <= 0:
                text.skip_to(position)
                return Value(line, None, why, position - begin, False)
        return Value(line, None, why, 0, True)

    def _enter_wrapper(self) -> bool:
        """Steps into the list of an object such as {"version": 1, "data": [ {…}, … ]}; False when it is none."""
        text = self._text
        while not text.ended and len(text.text) - text.at < _CHUNK_BYTES:
            text.grow()
        position = text.at + 1
        while True:
            match = _SPACE.match(text.text, position)
            assert match is not None
            try:
                key, position = self._json.raw_decode(text.text, match.end())
                colon = re.compile(r"[ \t\r\n]*:[ \t\r\n]*").match(text.text, position)
                if not isinstance(key, str) or colon is None:
                    return False
                position = colon.end()
                if key in WRAPPERS and re.compile(r"\[[ \t\r\n]*[{\]]").match(text.text, position):
                    text.skip_to(position + 1)
                    return True
                _, position = self._json.raw_decode(text.text, position)
            except (json.JSONDecodeError, RecursionError):
                return False
            comma = re.compile(r"[ \t\r\n]*,").match(text.text, position)
            if comma is None:
                return False
            position = comma.end()


def describe_json(error: json.JSONDecodeError) -> str:
    """The decoder's complaint, as a clause."""
    return f"{error.msg[:1].lower()}{error.msg[1:]} at column {error.colno}"
