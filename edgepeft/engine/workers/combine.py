"""`python -m edgepeft.engine.workers.combine`: combines LoRA adapters into one weights file.

A `CombineRequest` as JSON on stdin; lines of JSON on stdout: progress, then the outcome. Called by
`library.combine_client`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from edgepeft.engine.workers.replies import Replies
from edgepeft.errors import EdgepeftError, ExitCode, OutOfMemory
from edgepeft.library.combining import Combined, CombineRequest
from edgepeft.paths import disk_errors


def main() -> int:
    """Does what is asked for, and returns the exit code."""
    replies = Replies()
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=CombineRequest)
    try:
        with disk_errors(Path(request.weights_file)):
            replies.send(_combine(request, replies))
    except EdgepeftError as error:
        return replies.fail(error)
    except BrokenPipeError:
        # The reader is gone, and with it the folder.
        pass
    return ExitCode.DONE


def _combine(request: CombineRequest, replies: Replies) -> Combined:
    from edgepeft.engine.combine.composition import combine
    from edgepeft.engine.training.device import use_physical_cores
    from edgepeft.engine.training.recovery import is_out_of_memory

    use_physical_cores()
    try:
        return combine(request, replies.report)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        hint = "Close other programs, or combine fewer adapters at once"
        raise OutOfMemory("memory ran out", where="combine", hint=hint) from error


if __name__ == "__main__":
    sys.exit(main())
