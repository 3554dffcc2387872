"""`python -m edgepeft.engine.workers.combine`: combines LoRA adapters into one weights file.

A `CombineRequest` as JSON on stdin; lines of JSON on stdout: progress, then the outcome. Called by
`library.combine_client`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from edgepeft.engine.workers.replies import Replies
from edgepeft.library.combining import Combined, CombineRequest


def main() -> int:
    """Does what is asked for, and returns the exit code."""
    replies = Replies()
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=CombineRequest)

    def work() -> Combined:
        from edgepeft.engine.combine.composition import combine
        from edgepeft.engine.training.device import use_physical_cores

        use_physical_cores()
        return combine(request, replies.report)

    hint = "Close other programs, or combine fewer adapters at once"
    return replies.run(work, folder=Path(request.weights_file), where="combine", hint=hint)


if __name__ == "__main__":
    sys.exit(main())
