"""`python -m edgepeft.engine.workers.merge`: merges an adapter into its base, or exports it.

One request as JSON on stdin; lines of JSON on stdout: progress, then the outcome. Called by `library.merge_client`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from edgepeft.engine.workers.replies import Replies
from edgepeft.errors import BadInput, EdgepeftError, ExitCode, OutOfMemory
from edgepeft.library.merging import Exported, ExportRequest, Merged, MergeRequest
from edgepeft.paths import disk_errors


def main() -> int:
    """Does what is asked for, and returns the exit code."""
    replies = Replies()
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=MergeRequest | ExportRequest)
    try:
        replies.report("starting", None)
        with disk_errors(Path(request.work).parent.parent):
            outcome = _work(request, replies)
    except EdgepeftError as error:
        return replies.fail(error)
    except BrokenPipeError:
        # Nobody is left to answer, and the parent's folder is gone.
        return ExitCode.DONE
    except OSError as error:
        where = str(error.filename or request.work)
        return replies.fail(BadInput(f"cannot be used: {error.strerror or error}", where=where))
    replies.send(outcome)
    return ExitCode.DONE


def _work(request: MergeRequest | ExportRequest, replies: Replies) -> Merged | Exported:
    from edgepeft.engine.combine.jobs import export, merge
    from edgepeft.engine.training.recovery import is_out_of_memory

    try:
        return merge(request, replies.report) if isinstance(request, MergeRequest) else export(request, replies.report)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        hint = "Close other programs and try again"
        raise OutOfMemory("memory ran out", where=request.base, hint=hint) from error


if __name__ == "__main__":
    sys.exit(main())
