"""`python -m edgepeft.engine.workers.combine`: combines LoRA adapters into one weights file.

A `CombineRequest` as JSON on stdin; lines of JSON on stdout: progress, then the outcome. Called by
`library.combine_client`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import BinaryIO

import msgspec

from edgepeft.errors import EdgepeftError, ExitCode, OutOfMemory
from edgepeft.library.combining import Combined, CombineRequest
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
        if phase == self._last[1] and now - self._last[0] < _SECONDS_BETWEEN_REPORTS:
            return
        self._last = (now, phase)
        _send(self._replies, ConversionProgress(phase=phase, fraction=fraction))


def main() -> int:
    """Does what is asked for, and returns the exit code."""
    # Libraries print to stdout as they like; only the protocol may reach the reader.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=CombineRequest)
    try:
        with disk_errors(Path(request.weights_file)):
            _send(replies, _combine(request, _Reporter(replies)))
    except EdgepeftError as error:
        failed = ConversionFailed(code=int(error.exit_code), what=error.what, where=error.where, hint=error.hint)
        _send(replies, failed)
        return error.exit_code
    except BrokenPipeError:
        # The reader is gone, and with it the folder.
        pass
    return ExitCode.DONE


def _combine(request: CombineRequest, report: _Reporter) -> Combined:
    from edgepeft.engine.combine.composition import combine
    from edgepeft.engine.training.device import use_physical_cores
    from edgepeft.engine.training.recovery import is_out_of_memory

    use_physical_cores()
    try:
        return combine(request, report)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        hint = "Close other programs, or combine fewer adapters at once"
        raise OutOfMemory("memory ran out", where="combine", hint=hint) from error


def _send(replies: BinaryIO, message: ConversionProgress | Combined | ConversionFailed) -> None:
    replies.write(msgspec.json.encode(message) + b"\n")
    replies.flush()


if __name__ == "__main__":
    sys.exit(main())
