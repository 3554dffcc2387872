"""What plans are made from, read once for many plans of one session."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

Found = TypeVar("Found")


class Sources:
    """Devices, presets, bases and lengths of samples, each read when it is first asked for.

    A planner that answers again and again keeps one, so that a changed value costs no reading; `forget` makes it look
    again. What comes from a file is known by the file's size and time: one that changes is read anew.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def get(self, key: Hashable, read: Callable[[], Found]) -> Found:
        """What `read` gave when this key was first asked for; what it raises is not kept."""
        if key not in self._known:
            self._known[key] = read()
        found: Found = self._known[key]
        return found

    def forget(self) -> None:
        """Reads everything anew from now on."""
        self._known.clear()


def stamp(path: str | Path | None) -> tuple[str, int, int] | None:
    """A file's path, size and time of change, to know it by; sizes and times of a file that is not there are 0."""
    if path is None:
        return None
    try:
        found = Path(path).stat()
    except OSError:
        return str(path), 0, 0
    return str(path), found.st_size, found.st_mtime_ns
