"""The lock that says whether a run has a living worker.

The worker holds it for its whole life; the system releases it when the process ends, however it ends. A look at it
takes no exclusive lock, so it neither disturbs the holder nor is mistaken for one by another look.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path
from types import TracebackType

from edgepeft.errors import BadInput
from edgepeft.paths import disk_errors

LOCK_FILE = "lock"
_RETRY_SECONDS = 0.01
_HELD_ERRNOS = (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK)


class RunLock:
    """The exclusive hold on one run folder.

    Args:
        folder: the run folder.
        patience_seconds: how long taking it goes on trying. A look by `is_locked` blocks it for microseconds only, so a
            short patience tells a holder from a look.
    """

    def __init__(self, folder: str | os.PathLike[str], *, patience_seconds: float = 1.0) -> None:
        self.path = Path(folder) / LOCK_FILE
        self._patience_seconds = patience_seconds
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self) -> None:
        """Takes the lock and keeps it until `release` or the end of the process.

        Raises:
            BadInput: another process holds it.
            DiskProblem: the lock file cannot be written.
        """
        if self.held:
            raise RuntimeError(f"{self.path} is already held by this object")
        with disk_errors(self.path):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        deadline = time.monotonic() + self._patience_seconds
        try:
            # Windows refuses reads of a locked byte, which is how `is_locked` looks there: the byte must exist.
            with disk_errors(self.path):
                if os.fstat(descriptor).st_size == 0:
                    os.write(descriptor, b"\n")
            while not _try_exclusive(descriptor):
                if time.monotonic() >= deadline:
                    raise BadInput(
                        f"run {self.path.parent.name} already has a worker",
                        hint=f"Follow it with `edgepeft runs attach {self.path.parent.name}`",
                    )
                time.sleep(_RETRY_SECONDS)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        if hasattr(os, "register_at_fork"):
            # A forked child that never executes another program would otherwise hold the run after its parent's death.
            os.register_at_fork(after_in_child=self._forget)

    def release(self) -> None:
        """Gives the lock back; does nothing when it is not held."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        _unlock(descriptor)
        os.close(descriptor)

    def _forget(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def is_locked(folder: str | os.PathLike[str]) -> bool:
    """Whether a process holds the lock of this run folder now; False when there is no lock file.

    Raises:
        DiskProblem: the lock file may not be read.
    """
    path = Path(folder) / LOCK_FILE
    try:
        with disk_errors(path):
            descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _is_free(descriptor)
    finally:
        os.close(descriptor)


if sys.platform == "win32":
    import msvcrt

    def _try_exclusive(descriptor: int) -> bool:
        os.lseek(descriptor, 0, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in _HELD_ERRNOS:
                return False
            raise
        return True

    def _unlock(descriptor: int) -> None:
        os.lseek(descriptor, 0, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

    def _is_free(descriptor: int) -> bool:
        try:
            os.read(descriptor, 1)
        except PermissionError:
            return False
        return True

else:
    import fcntl

    def _try_exclusive(descriptor: int) -> bool:
        return _try_flock(descriptor, fcntl.LOCK_EX)

    def _unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)

    def _is_free(descriptor: int) -> bool:
        # Shared, so that two looks at the same moment do not take each other for the holder.
        return _try_flock(descriptor, fcntl.LOCK_SH)

    def _try_flock(descriptor: int, kind: int) -> bool:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD_ERRNOS:
                return False
            raise
        return True
