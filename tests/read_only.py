"""A folder on a read-only file system, for tests that may run as root, whom permissions do not stop."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir")


def make_read_only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Whatever changes something below `folder` fails as on a read-only file system; reading works."""

    def refuse(path: Any) -> None:
        try:
            inside = Path(os.fsdecode(path)).absolute().is_relative_to(folder)
        except TypeError:
            # A descriptor: it was opened before.
            return
        if inside:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))

    real_os_open, real_open, real_access = os.open, io.open, os.access

    def os_open(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & _WRITING:
            refuse(path)
        return real_os_open(path, flags, *arguments, **options)

    def io_open(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if set(mode) & set("wax+"):
            refuse(path)
        return real_open(path, mode, *arguments, **options)

    def access(path: Any, mode: int, **options: Any) -> bool:
        try:
            if mode & os.W_OK:
                refuse(path)
        except OSError:
            return False
        return real_access(path, mode, **options)

    def changing(real: Any) -> Any:
        def change(path: Any, *arguments: Any, **options: Any) -> Any:
            if options.get("dir_fd") is None:
                refuse(path)
            for other in arguments[:1]:
                if isinstance(other, str | os.PathLike):
                    refuse(other)
            return real(path, *arguments, **options)

        return change

    monkeypatch.setattr(os, "open", os_open)
    monkeypatch.setattr(io, "open", io_open)
    monkeypatch.setattr(os, "access", access)
    for name in _CHANGES:
        monkeypatch.setattr(os, name, changing(getattr(os, name)))
