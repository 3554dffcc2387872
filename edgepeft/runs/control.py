"""What a person asks of a running worker: one small file, replaced as a whole, polled by the worker between steps."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Literal

import msgspec

from edgepeft.paths import disk_errors, write_atomic

CONTROL_FILE = "control.json"

FORCE_HINT = (
    "Put the planned file back, or resume the run with --force: it then goes on with the file as it was, whose tokens "
    "are in the cache; to learn from the file as it is now, train anew"
)
"""What to do about a run whose data changed under it."""

Request = Literal["stop", "pause", "checkpoint"]


class _Control(msgspec.Struct, frozen=True):
    request: Request
    time: float
    """Seconds since 1970."""


def request(folder: str | os.PathLike[str], what: Request) -> None:
    """Asks the worker of this run folder to stop and save, to pause, or to write a checkpoint; the last request counts.

    Raises:
        DiskProblem: the request cannot be written.
    """
    write_atomic(Path(folder) / CONTROL_FILE, msgspec.json.encode(_Control(request=what, time=time.time())))


def read_request(folder: str | os.PathLike[str]) -> Request | None:
    """The open request; None when there is none, or none that this version knows."""
    return _read(Path(folder) / CONTROL_FILE)


def take_request(folder: str | os.PathLike[str]) -> Request | None:
    """The open request, removed so that it is obeyed once; one that arrives meanwhile stays for the next look."""
    path = Path(folder) / CONTROL_FILE
    taken = path.with_name(f".{CONTROL_FILE}.taken")
    try:
        with disk_errors(path):
            path.replace(taken)
    except FileNotFoundError:
        return None
    found = _read(taken)
    taken.unlink(missing_ok=True)
    return found


def clear_request(folder: str | os.PathLike[str]) -> None:
    """Removes a request that belongs to an earlier worker."""
    path = Path(folder) / CONTROL_FILE
    with disk_errors(path):
        path.unlink(missing_ok=True)


def _read(path: Path) -> Request | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Control).request
    except (FileNotFoundError, PermissionError, msgspec.MsgspecError):
        # Windows denies access for the moment in which the file is being replaced; the next look sees the new one.
        return None
