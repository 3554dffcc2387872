"""All runs, looked at again and again: what cannot have changed since the last look is not read twice."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

from edgepeft.errors import DiskProblem
from edgepeft.runs.layout import RunFolder, list_runs
from edgepeft.runs.lock import is_locked
from edgepeft.runs.state import RunSummary, summarise_run

_CHUNK = 50
_Marks = tuple[tuple[int, int] | None, ...]


class RunListing:
    """Summaries of every run; safe to use from several threads.

    A run without a worker is what it was as long as its plan, its events and its launches have the same size and time
    and nobody holds its lock. One costs a millisecond at the first look and a tenth of it later.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[_Marks, RunSummary]] = {}
        self._guard = threading.Lock()

    def read(self) -> list[RunSummary]:
        """Every run, the newest first."""
        return [summary for chunk in self.read_in_chunks() for summary in chunk]

    def read_in_chunks(self) -> Iterator[list[RunSummary]]:
        """The same, some at a time, so that the first of many are seen before the last are read.

        Raises:
            DiskProblem: the folder of runs may not be read.
        """
        runs = list_runs()
        with self._guard:
            there = {os.fspath(run) for run in runs}
            self._known = {path: seen for path, seen in self._known.items() if path in there}
        for start in range(0, len(runs), _CHUNK):
            yield [self._summary(run) for run in runs[start : start + _CHUNK]]

    def _summary(self, run: RunFolder) -> RunSummary:
        path = os.fspath(run)
        # Before the look: what changes during it is seen by the next one.
        marks = _marks(run)
        with self._guard:
            seen = self._known.get(path)
        if seen is not None and seen[0] == marks and not seen[1].state.alive and not _has_worker(run):
            return seen[1]
        summary = summarise_run(run)
        with self._guard:
            self._known[path] = marks, summary
        return summary


def _has_worker(run: RunFolder) -> bool:
    try:
        return is_locked(run)
    except DiskProblem:
        return False


def _marks(run: RunFolder) -> _Marks:
    """Size and time of what a summary is read from; None for what is not there."""
    return tuple(_mark(path) for path in (run.plan_file, run.events_file, run.launched_file))


def _mark(path: os.PathLike[str]) -> tuple[int, int] | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - thrice for each of hundreds of runs, twice a second
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
