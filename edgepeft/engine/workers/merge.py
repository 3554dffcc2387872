"""`python -m edgepeft.engine.workers.merge`: merges an adapter into its base, or exports it.

One request as JSON on stdin; lines of JSON on stdout: progress, then the outcome. Called by `library.merge_client`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from edgepeft.engine.workers.replies import Replies
from edgepeft.library.merging import Exported, ExportRequest, Merged, MergeRequest


def main() -> int:
    """Does what is asked for, and returns the exit code."""
    replies = Replies()
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=MergeRequest | ExportRequest)

    def work() -> Merged | Exported:
        replies.report("starting", None)
        from edgepeft.engine.combine.jobs import export, merge

        if isinstance(request, MergeRequest):
            return merge(request, replies.report)
        return export(request, replies.report)

    folder, hint = Path(request.work).parent.parent, "Close other programs and try again"
    return replies.run(work, folder=folder, where=request.base, hint=hint)


if __name__ == "__main__":
    sys.exit(main())
