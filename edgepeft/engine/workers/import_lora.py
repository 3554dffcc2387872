"""`python -m edgepeft.engine.workers.import_lora`: reads a LoRA file and writes it as PEFT's tensors.

An `ImportRequest` as JSON on stdin; lines of JSON on stdout: progress, then the outcome. Called by
`library.import_client`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from edgepeft.engine.workers.replies import Replies
from edgepeft.library.lora_file import Imported, ImportRequest


def main() -> int:
    """Does what is asked for, and returns the exit code."""
    replies = Replies()
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=ImportRequest)

    def work() -> Imported:
        replies.report("starting", None)
        from edgepeft.engine.combine.lora_import import import_lora

        return import_lora(request, replies.report)

    folder, hint = Path(request.weights_file).parent, "Close other programs and try again"
    return replies.run(work, folder=folder, where=request.file.path, hint=hint)


if __name__ == "__main__":
    sys.exit(main())
