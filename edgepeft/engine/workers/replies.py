"""What a worker that ends with its work tells the process that started it: progress, then an outcome or a failure."""

from __future__ import annotations

import logging
import os
import time

import msgspec

from edgepeft.errors import EdgepeftError
from edgepeft.processes import WorkFailed, WorkProgress

_SECONDS_BETWEEN_REPORTS = 0.2


class Replies:
    """Lines of JSON on what was stdout; from here on libraries print to stderr."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        self._last = (0.0, "")

    def report(self, phase: str, fraction: float | None) -> None:
        """Tells how far the work is, not more often than a person can see."""
        now = time.monotonic()
        if phase == self._last[1] and now - self._last[0] < _SECONDS_BETWEEN_REPORTS and fraction != 1.0:
            return
        self._last = (now, phase)
        self.send(WorkProgress(phase=phase, fraction=fraction))

    def send(self, message: msgspec.Struct) -> None:
        """Tells the outcome."""
        self._file.write(msgspec.json.encode(message) + b"\n")
        self._file.flush()

    def fail(self, error: EdgepeftError) -> int:
        """Tells what went wrong; returns the exit code."""
        self.send(WorkFailed(code=int(error.exit_code), what=error.what, where=error.where, hint=error.hint))
        return error.exit_code
