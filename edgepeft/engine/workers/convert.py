"""Turns a GGUF file or a slow tokenizer into files that the light side reads; called by `edgepeft.models.conversion`.

    python -m edgepeft.engine.workers.convert gguf SOURCE FOLDER
    python -m edgepeft.engine.workers.convert tokenizer SOURCE FOLDER

FOLDER exists and is empty. Each line on stdout is one JSON object: progress, then the outcome.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

import msgspec

from edgepeft.errors import BadInput, DiskProblem, EdgepeftError, ExitCode
from edgepeft.models.conversion import ConversionFailed, ConversionProgress, Converted
from edgepeft.paths import disk_errors

_SECONDS_BETWEEN_REPORTS = 0.2


class _Reporter:
    """Sends progress to the parent, not more often than a person can see."""

    def __init__(self) -> None:
        self._last = (0.0, "")

    def __call__(self, phase: str, fraction: float | None) -> None:
        now = time.monotonic()
        if phase == self._last[1] and now - self._last[0] < _SECONDS_BETWEEN_REPORTS and fraction != 1.0:
            return
        self._last = (now, phase)
        _send(ConversionProgress(phase=phase, fraction=fraction))


def _send(message: ConversionProgress | Converted | ConversionFailed) -> None:
    sys.stdout.write(msgspec.json.encode(message).decode() + "\n")
    sys.stdout.flush()


def _convert(kind: str, source: Path, folder: Path) -> Converted:
    report = _Reporter()
    if kind == "gguf":
        from edgepeft.engine.model.gguf import convert_gguf

        return convert_gguf(source, folder, report)
    report("tokenizer", None)
    from edgepeft.engine.model.tokenizer_files import convert_tokenizer

    return Converted(notes=tuple(convert_tokenizer(source, folder)))


def main(arguments: list[str]) -> int:
    """Converts, and returns the exit code."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    kind, source, folder = arguments[0], Path(arguments[1]), Path(arguments[2])
    try:
        with disk_errors(folder):
            outcome = _convert(kind, source, folder)
    except (BadInput, DiskProblem) as error:
        return _failed(error)
    except MemoryError:
        return _failed(BadInput("there is not enough memory to convert this file", where=str(source)))
    _send(outcome)
    return ExitCode.DONE


def _failed(error: EdgepeftError) -> int:
    _send(ConversionFailed(code=int(error.exit_code), what=error.what, where=error.where, hint=error.hint))
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
