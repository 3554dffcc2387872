"""`events.jsonl`: appended by one worker, read by anybody at any moment, also after a crash within a line."""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

import msgspec

from edgepeft.errors import DiskProblem
from edgepeft.paths import disk_errors
from edgepeft.runs.events import Event

_READ_BYTES = 1 << 22
_KINDS: frozenset[str] = frozenset(str(kind.__struct_config__.tag) for kind in get_args(Event))
_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


def encode_event(event: Event) -> bytes:
    """One line of `events.jsonl`, with its line end. Numbers that are not finite become null."""
    try:
        return _encoder.encode(event) + b"\n"
    except UnicodeEncodeError:
        # A path that is not valid Unicode may stand in a message; that must not end a run.
        text = json.dumps(msgspec.to_builtins(event), ensure_ascii=False)
        return text.encode("utf-8", errors="replace") + b"\n"


def decode_event(line: bytes) -> Event | None:
    """The event of one line; None when its type belongs to a later version.

    A null where a number must be reads as NaN: it is how JSON lines carry a loss that is not finite.

    Raises:
        ValueError: the line is not a JSON object, or not a valid event.
    """
    try:
        return _decoder.decode(line)
    except msgspec.ValidationError as error:
        found = _decode_object(line)
        kind = found.get("type")
        if isinstance(kind, str) and kind not in _KINDS:
            return None
        if None not in found.values():
            raise ValueError(f"not a valid event: {error}") from error
        numbers = {key: math.nan if value is None else value for key, value in found.items()}
        try:
            event: Event = msgspec.convert(numbers, Event)
        except msgspec.ValidationError as still:
            raise ValueError(f"not a valid event: {still}") from still
        return event
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not JSON: {error}") from error


def _decode_object(line: bytes) -> dict[str, Any]:
    found = msgspec.json.decode(line)
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


class EventWriter:
    """Appends events to one file, each by a single write, so that a kill leaves at most one torn line: the last."""

    def __init__(self, path: Path) -> None:
        """Opens `path`, which is made when it is missing, and ends a last line that a crash left open.

        Raises:
            DiskProblem: the file cannot be written.
        """
        self.path = path
        self._torn = _ends_inside_a_line(path)
        with disk_errors(path):
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
            self._descriptor = os.open(path, flags, 0o666)

    def write(self, event: Event) -> None:
        """Appends `event` with the time of now.

        Raises:
            DiskProblem: the disk is full, or does not answer.
        """
        line = encode_event(msgspec.structs.replace(event, time=time.time()))
        if self._torn:
            line = b"\n" + line
        with disk_errors(self.path):
            written = os.write(self._descriptor, line)
        self._torn = written < len(line)
        if self._torn:
            raise DiskProblem(
                "the disk is full",
                where=str(self.path),
                hint="Free some space, or set EDGEPEFT_HOME to another disk",
            )

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> EventWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _ends_inside_a_line(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            if file.seek(0, io.SEEK_END) == 0:
                return False
            file.seek(-1, io.SEEK_END)
            return file.read(1) != b"\n"
    except FileNotFoundError:
        return False


class Follower:
    """Reads an event file as it grows.

    A half-written last line waits in a buffer until its rest arrives. A file that was cut or replaced is read again
    from its beginning.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.skipped = 0
        """Lines that could not be decoded."""
        self.unknown = 0
        """Events of a type that this version does not know."""
        self.restarts = 0
        """How often the file was found cut or replaced; what was read before then is void."""
        self._offset = 0
        self._identity: tuple[int, int] | None = None
        self._rest = b""

    @property
    def read_bytes(self) -> int:
        """How much of the file has been read."""
        return self._offset

    def read(self) -> list[Event]:
        """The events that were completed since the last call; none while the file does not exist.

        Raises:
            DiskProblem: the file may not be read.
        """
        events: list[Event] = []
        try:
            with disk_errors(self.path), self.path.open("rb") as file:
                self._notice_replacement(os.fstat(file.fileno()))
                file.seek(self._offset)
                while chunk := file.read(_READ_BYTES):
                    self._offset += len(chunk)
                    *lines, self._rest = (self._rest + chunk).split(b"\n")
                    events += self._decode(lines)
        except FileNotFoundError:
            return events
        return events

    def _notice_replacement(self, status: os.stat_result) -> None:
        identity = (status.st_dev, status.st_ino)
        if status.st_size < self._offset or self._identity not in (None, identity):
            self.restarts += 1
            self._offset, self._rest, self.skipped, self.unknown = 0, b"", 0, 0
        self._identity = identity

    def _decode(self, lines: Iterable[bytes]) -> list[Event]:
        events: list[Event] = []
        for line in lines:
            if not line.strip():
                continue
            try:
                event = decode_event(line)
            except ValueError:
                self.skipped += 1
                continue
            if event is None:
                self.unknown += 1
            else:
                events.append(event)
        return events


def read_events(path: Path) -> list[Event]:
    """All complete events of a file, in order; undecodable lines and unknown types are left out.

    Raises:
        DiskProblem: the file may not be read.
    """
    return Follower(path).read()


def read_last_events(path: Path, tail_bytes: int = 1 << 16) -> tuple[list[Event], bool]:
    """The events within the last `tail_bytes` of a file, and whether these are all it has."""
    follower = Follower(path)
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return [], True
    if size <= tail_bytes:
        return follower.read(), True
    with disk_errors(path), path.open("rb") as file:
        file.seek(size - tail_bytes)
        lines = file.read().split(b"\n")
    # The first piece begins inside a line, the last one is not ended yet.
    return follower._decode(lines[1:-1]), False
