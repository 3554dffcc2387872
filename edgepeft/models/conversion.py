"""Starts the convert worker and listens to it; what it writes appears whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from edgepeft.errors import EdgepeftError, ExitCode, error_for_code
from edgepeft.processes import ask_worker

Progress = Callable[[str, float | None], None]
"""Called with what is being done, and how much of it is done (0 to 1; None when that is not known)."""


class ConversionProgress(msgspec.Struct, frozen=True, tag="progress"):
    """How far the worker is."""

    phase: str
    """What it does now."""
    fraction: float | None = None
    """Share of it that is done; None when not known."""


class Converted(msgspec.Struct, frozen=True, tag="converted"):
    """The worker is done."""

    notes: tuple[str, ...] = ()
    """What the user should know about the result."""
    licence: str | None = None
    """As the file says it."""


class ConversionFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The worker gave up."""

    code: int
    """Its exit code."""
    what: str
    """What is wrong."""
    where: str = ""
    """File or tensor."""
    hint: str = ""
    """What to do next."""


_DECODER = msgspec.json.Decoder(ConversionProgress | Converted | ConversionFailed)


def convert(kind: str, source: Path, folder: Path, progress: Progress | None) -> Converted:
    """Runs the convert worker on `source`, into the existing folder; returns what it said at its end.

    Args:
        kind: `gguf`, or `tokenizer` for a model folder without a tokenizer.json.

    Raises:
        EdgepeftError: the file cannot be converted, the disk is full, or the worker died.
    """
    outcomes: list[Converted | ConversionFailed] = []

    def hear(line: bytes) -> None:
        try:
            message = _DECODER.decode(line)
        except msgspec.DecodeError:
            return
        if not isinstance(message, ConversionProgress):
            outcomes.append(message)
        elif progress is not None:
            progress(message.phase, message.fraction)

    code, last_line = ask_worker("convert", [kind, str(source), str(folder)], hear)
    outcome = outcomes[-1] if outcomes else None
    if isinstance(outcome, Converted) and code == 0:
        return outcome
    if isinstance(outcome, ConversionFailed):
        raise error_for_code(outcome.code, outcome.what, where=outcome.where, hint=outcome.hint)
    raise _died(code, source, last_line)


def _died(code: int, source: Path, last_line: str) -> EdgepeftError:
    if code in (-9, 137):
        return error_for_code(
            ExitCode.OUT_OF_MEMORY,
            "the system ended the conversion, most likely because memory ran out",
            where=str(source),
            hint="Close other programs and try again",
        )
    reason = f": {last_line}" if last_line else ""
    return error_for_code(ExitCode.BUG, f"the conversion ended with code {code}{reason}", where=str(source))
