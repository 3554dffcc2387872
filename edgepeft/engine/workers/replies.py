"""What a worker that ends with its work tells the process that started it: progress, then an outcome or a failure."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from edgepeft.errors import BadInput, EdgepeftError, ExitCode, OutOfMemory
from edgepeft.paths import disk_errors
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

    def run(self, work: Callable[[], msgspec.Struct], *, folder: Path, where: str, hint: str) -> int:
        """Does the work and tells its outcome, or what went wrong; returns the exit code.

        Args:
            work: makes the outcome.
            folder: what the disk is asked for, in messages.
            where: what is worked on.
            hint: what helps where memory runs out.
        """
        from edgepeft.engine.training.recovery import is_out_of_memory

        try:
            with disk_errors(folder):
                try:
                    outcome = work()
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    raise OutOfMemory("memory ran out", where=where, hint=hint) from error
            self.send(outcome)
        except EdgepeftError as error:
            return self.fail(error)
        except BrokenPipeError:
            # The reader is gone, and with it the folder.
            pass
        except OSError as error:
            return self.fail(BadInput(f"cannot be used: {error.strerror or error}", where=str(error.filename or where)))
        return ExitCode.DONE

    def send(self, message: msgspec.Struct) -> None:
        """Tells the outcome."""
        self._file.write(msgspec.json.encode(message) + b"\n")
        self._file.flush()

    def fail(self, error: EdgepeftError) -> int:
        """Tells what went wrong; returns the exit code."""
        self.send(WorkFailed(code=int(error.exit_code), what=error.what, where=error.where, hint=error.hint))
        return error.exit_code
