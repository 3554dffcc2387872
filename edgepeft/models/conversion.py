"""Starts the convert worker and listens to it; what it writes appears whole or not at all."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edgepeft.processes import Progress, Task, run_task


class Converted(msgspec.Struct, frozen=True, tag="converted"):
    """The worker is done."""

    notes: tuple[str, ...] = ()
    """What the user should know about the result."""
    licence: str | None = None
    """As the file says it."""


def convert(kind: str, source: Path, folder: Path, progress: Progress | None) -> Converted:
    """Runs the convert worker on `source`, into the existing folder; returns what it said at its end.

    Args:
        kind: `gguf`, or `tokenizer` for a model folder without a tokenizer.json.

    Raises:
        EdgepeftError: the file cannot be converted, the disk is full, or the worker died.
    """
    task = Task("convert", "the conversion", str(source), (kind, str(source), str(folder)))
    return run_task(task, Converted, progress)
