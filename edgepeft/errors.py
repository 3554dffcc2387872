"""Errors for people, and the exit codes of every command.

An `EdgepeftError` says what is wrong, where, and what to do next. The command line prints it as one line on stderr and
exits with its code; a worker writes it into its `failed` event. Anything else that escapes is a bug of ours.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """What a finished process tells its caller."""

    DONE = 0
    BUG = 1
    USAGE = 2
    BAD_INPUT = 3
    DOES_NOT_FIT = 4
    OUT_OF_MEMORY = 5
    DEVICE = 6
    DISK = 7
    INTERRUPTED = 130


class EdgepeftError(Exception):
    """A mistake or a limit that its reader can do something about.

    Args:
        what: what is wrong, as a sentence without a full stop.
        where: the file, line, field or option it was found in; empty when `what` says it.
        hint: what to do next, as a sentence without a full stop.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.BAD_INPUT

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        # What a library said may come with a full stop of its own.
        self.what = what.rstrip(". ")
        self.where = where
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        return f"{line}. {self.hint}." if self.hint else f"{line}."

    def lines(self, prefix: str, width: int) -> list[str]:
        """What a command prints when it ends with this error: one line, unless an error has more to say.

        Args:
            prefix: what the first line begins with.
            width: columns that longer texts are wrapped to.
        """
        return [prefix + " ".join(str(self).split())]


class UsageError(EdgepeftError):
    """An option or an argument that cannot be meant."""

    exit_code = ExitCode.USAGE


class BadInput(EdgepeftError):
    """A file, a model, a record or an adapter that cannot be used."""

    exit_code = ExitCode.BAD_INPUT


class DoesNotFit(EdgepeftError):
    """No plan fits the budget."""

    exit_code = ExitCode.DOES_NOT_FIT


class OutOfMemory(EdgepeftError):
    """Memory ran out while running, and no smaller layout was left."""

    exit_code = ExitCode.OUT_OF_MEMORY


class DeviceUnusable(EdgepeftError):
    """A card, a driver or a library that the run needs does not work."""

    exit_code = ExitCode.DEVICE


class DiskProblem(EdgepeftError):
    """No space, no permission, or a medium that fails."""

    exit_code = ExitCode.DISK


class Interrupted(EdgepeftError):
    """The user asked to stop; everything that can be kept is kept."""

    exit_code = ExitCode.INTERRUPTED


def error_for_code(code: int, what: str, *, where: str = "", hint: str = "") -> EdgepeftError:
    """The error that a child process ended with, made anew from its exit code and message."""
    kinds: dict[int, type[EdgepeftError]] = {
        kind.exit_code: kind
        for kind in (UsageError, BadInput, DoesNotFit, OutOfMemory, DeviceUnusable, DiskProblem, Interrupted)
    }
    return kinds.get(code, EdgepeftError)(what, where=where, hint=hint)
