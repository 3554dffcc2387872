"""`python -m edgepeft.engine.workers.simulate`: dry runs.

Each line of stdin is a `DryRunRequest` as JSON; each is answered with one line on stdout, a `DryRun` or a
`DryRunFailed`, in order. The end of stdin ends the process.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from typing import BinaryIO

import msgspec

from edgepeft.errors import EdgepeftError, ExitCode
from edgepeft.memory.dry_run import DryRun, DryRunFailed, DryRunRequest


def main() -> int:
    """Answers until the end of stdin; a request that cannot be simulated is an answer, too."""
    # Libraries print to stdout as they like; only answers may reach the reader.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    try:
        for line in sys.stdin.buffer:
            if line.strip():
                _send(answers, _answer(line))
    except BrokenPipeError:
        # The reader is gone.
        pass
    return ExitCode.DONE


def _answer(line: bytes) -> DryRun | DryRunFailed:
    try:
        request = msgspec.json.decode(line, type=DryRunRequest)
    except msgspec.MsgspecError as error:
        return DryRunFailed(ExitCode.USAGE, f"the request cannot be read: {error}")
    except EdgepeftError as error:
        return _failed(error)
    from edgepeft.engine.simulate import dry_run

    try:
        return dry_run(request)
    except EdgepeftError as error:
        return _failed(error)
    except Exception as error:  # noqa: BLE001 - one bad request must not end the answers to others
        traceback.print_exc()
        first_line = (str(error).strip().splitlines() or [""])[0]
        return DryRunFailed(
            ExitCode.BUG,
            f"this model cannot be simulated: {type(error).__name__}: {first_line}"[:300],
            where=str(request.config.get("model_type", "")),
            hint="Its training step does something that needs values; train with a budget below what is free",
        )


def _failed(error: EdgepeftError) -> DryRunFailed:
    return DryRunFailed(int(error.exit_code), error.what, error.where, error.hint)


def _send(answers: BinaryIO, answer: DryRun | DryRunFailed) -> None:
    answers.write(msgspec.json.encode(answer) + b"\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
