"""`python -m edgepeft.engine.workers.merge`: merges an adapter into its base, or exports it.

One request as JSON on stdin; lines of JSON on stdout: progress, then the outcome. Called by `library.merge_client`.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import BinaryIO

import msgspec

from edgepeft.errors import BadInput, EdgepeftError, ExitCode, OutOfMemory
from edgepeft.library.merging import Exported, ExportRequest, Merged, MergeRequest
from edgepeft.models.conversion import ConversionFailed, ConversionProgress
from edgepeft.paths import disk_errors

_SECONDS_BETWEEN_REPORTS = 0.2


class _Reporter:
    """Sends progress to the parent, not more often than a person can see."""

    def __init__(self, replies: BinaryIO) -> None:
        self._replies = replies
        self._last = (0.0, "")

    def __call__(self, phase: str, fraction: float | None) -> None:
        now = time.monotonic()
        if phase == self._last[1] and now - self._last[0] < _SECONDS_BETWEEN_REPORTS and fraction != 1.0:
            return
        self._last = (now, phase)
        _send(self._replies, ConversionProgress(phase=phase, fraction=fraction))


def main() -> int:
    """Does what is asked for, and returns the exit code."""
    # Libraries print to stdout as they like; only the protocol may reach the reader.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=MergeRequest | ExportRequest)
    report = _Reporter(replies)
    try:
        report("starting", None)
        with disk_errors(Path(request.work).parent.parent):
            outcome = _work(request, report)
    except EdgepeftError as error:
        return _failed(replies, error)
    except BrokenPipeError:
        # Nobody is left to answer, and the parent's folder is gone.
        return ExitCode.DONE
    except OSError as error:
        where = str(error.filename or request.work)
        return _failed(replies, BadInput(f"cannot be used: {error.strerror or error}", where=where))
    _send(replies, outcome)
    return ExitCode.DONE


def _work(request: MergeRequest | ExportRequest, report: _Reporter) -> Merged | Exported:
    from edgepeft.engine.combine.jobs import export, merge
    from edgepeft.engine.training.recovery import is_out_of_memory

    try:
        return merge(request, report) if isinstance(request, MergeRequest) else export(request, report)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        hint = "Close other programs and try again"
        raise OutOfMemory("memory ran out", where=request.base, hint=hint) from error


def _failed(replies: BinaryIO, error: EdgepeftError) -> int:
    _send(replies, ConversionFailed(code=int(error.exit_code), what=error.what, where=error.where, hint=error.hint))
    return error.exit_code


def _send(replies: BinaryIO, message: ConversionProgress | Merged | Exported | ConversionFailed) -> None:
    replies.write(msgspec.json.encode(message) + b"\n")
    replies.flush()


if __name__ == "__main__":
    sys.exit(main())
