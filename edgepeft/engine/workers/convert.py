"""Turns a GGUF file or a slow tokenizer into files that the light side reads; called by `edgepeft.models.conversion`.

    python -m edgepeft.engine.workers.convert gguf SOURCE FOLDER
    python -m edgepeft.engine.workers.convert tokenizer SOURCE FOLDER

FOLDER exists and is empty. Each line on stdout is one JSON object: progress, then the outcome.
"""

from __future__ import annotations

import sys
from pathlib import Path

from edgepeft.engine.workers.replies import Replies
from edgepeft.models.conversion import Converted


def main(arguments: list[str]) -> int:
    """Converts, and returns the exit code."""
    kind, source, folder = arguments[0], Path(arguments[1]), Path(arguments[2])
    replies = Replies()

    def work() -> Converted:
        if kind == "gguf":
            from edgepeft.engine.model.gguf import convert_gguf

            return convert_gguf(source, folder, replies.report)
        replies.report("tokenizer", None)
        from edgepeft.engine.model.tokenizer_files import convert_tokenizer

        return Converted(notes=tuple(convert_tokenizer(source, folder)))

    return replies.run(work, folder=folder, where=str(source), hint="Close other programs and try again")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
