"""Where things lie, and how a file is written so that a crash never leaves half of it.

Everything lies under `EDGEPEFT_HOME` when that is set, else in the places that platformdirs names for this system.
Nothing here creates a folder until something is written into it.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from edgepeft.errors import DiskProblem, UsageError

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_RESERVED = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?")
"""Devices of Windows, whatever ending follows: a folder of that name cannot be made or copied there."""


class Home(msgspec.Struct, frozen=True):
    """The folders of one installation."""

    models: Path
    """Base models: one folder each."""
    adapters: Path
    """The adapter library: NAME/v1, NAME/v2, …"""
    runs: Path
    """One folder for each training run."""
    conversations: Path
    """Conversations of the chat screen, one file each."""
    cache: Path
    """What can be deleted at any time and is made again when needed."""
    config_file: Path
    """The user's settings, TOML."""
    profiles: Path
    """The user's own hardware profiles and presets; they override shipped ones of the same id."""


def home() -> Home:
    """The folders in force now; the environment is read at each call."""
    root = os.environ.get("EDGEPEFT_HOME")
    if root:
        base = Path(root).expanduser().absolute()
        return Home(
            models=base / "models",
            adapters=base / "adapters",
            runs=base / "runs",
            conversations=base / "conversations",
            cache=base / "cache",
            config_file=base / "config.toml",
            profiles=base / "profiles",
        )
    from platformdirs import PlatformDirs

    dirs = PlatformDirs("edgepeft", appauthor=False)
    data = Path(dirs.user_data_dir)
    return Home(
        models=data / "models",
        adapters=data / "adapters",
        runs=data / "runs",
        conversations=data / "conversations",
        cache=Path(dirs.user_cache_dir),
        config_file=Path(dirs.user_config_dir) / "config.toml",
        profiles=Path(dirs.user_config_dir) / "profiles",
    )


def builtin_profiles() -> Path:
    """The shipped profiles: inside the installed package, or the checkout's own folder in an editable install."""
    package = Path(__file__).parent
    packed = package / "_profiles"
    return packed if packed.is_dir() else package.parent / "profiles"


def check_name(name: str, *, where: str = "--name") -> str:
    """Returns `name` when it can name a model, an adapter or a run.

    Raises:
        UsageError: it does not match `[a-z0-9][a-z0-9._-]{0,63}`, ends in a dot, or is a device of Windows.
    """
    if _RESERVED.fullmatch(name):
        raise UsageError(f"{name!r} is a reserved word of Windows", where=where, hint=f"Use for example my-{name}")
    if name.endswith("."):
        raise UsageError(f"{name!r} ends in a dot, which Windows drops", where=where, hint="Leave the dot out")
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be used as a name",
            where=where,
            hint="Use 1 to 64 characters of a-z, 0-9, dot, dash and underscore, beginning with a letter or a digit",
        )
    return name


def as_name(text: str) -> str:
    """The nearest valid name to `text`, for defaults: `Llama-3.2 1B` becomes `llama-3.2-1b`."""
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:64].rstrip("-._")
    return f"my-{name}" if _RESERVED.fullmatch(name) else name or "model"


class FolderSize(msgspec.Struct, frozen=True):
    """What a folder, or a file, holds."""

    size_bytes: int
    """Of the files that could be looked at; links are not followed."""
    unreadable: int = 0
    """Folders and files that could not be."""


def places() -> dict[str, Path]:
    """What is where, by what a person calls it."""
    folders = home()
    return {
        "models": folders.models,
        "adapters": folders.adapters,
        "runs": folders.runs,
        "conversations": folders.conversations,
        "cache": folders.cache,
        "settings": folders.config_file,
        "own profiles": folders.profiles,
        "shipped profiles": builtin_profiles(),
    }


def measure_size(path: Path) -> FolderSize | None:
    """The bytes below `path`; None where nothing is there."""
    size = unreadable = 0
    waiting = [path]
    while waiting:
        place = waiting.pop()
        try:
            found = place.lstat() if place != path else place.stat()
            if stat.S_ISDIR(found.st_mode):
                waiting += list(place.iterdir())
            elif stat.S_ISREG(found.st_mode):
                size += found.st_size
        except FileNotFoundError:
            if place == path:
                return None
        except OSError:
            unreadable += 1
    return FolderSize(size, unreadable)


def clear_cache() -> Path:
    """Deletes the cache, which is made again when needed; returns where it was.

    Raises:
        DiskProblem: a file may not be deleted.
    """
    cache = home().cache
    with disk_errors(cache):
        if cache.is_dir():
            shutil.rmtree(cache)
    return cache


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns the system's errors about `path` into a `DiskProblem` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskProblem(
                "the disk is full", where=str(path), hint="Free some space, or set EDGEPEFT_HOME to another disk"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise DiskProblem(
                "no permission to write here",
                where=str(path),
                hint="Change the permissions, or set EDGEPEFT_HOME to a folder of yours",
            ) from error
        if error.errno in (errno.EIO, errno.ENODEV, errno.ENXIO):
            raise DiskProblem(
                f"the disk does not answer: {error.strerror}",
                where=str(path),
                hint="Check the medium, or set EDGEPEFT_HOME to another disk",
            ) from error
        raise


def make_folder(folder: Path) -> None:
    """Makes `folder` and those above it; one that exists is fine.

    Raises:
        DiskProblem: there is no permission, no space, or something else lies in the way.
    """
    with disk_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
            raise DiskProblem(
                "this folder cannot be made",
                where=str(folder),
                hint="Check the path, and EDGEPEFT_HOME where it is set",
            ) from error


@contextmanager
def temporary_folder(parent: Path, prefix: str = "", suffix: str = "") -> Iterator[Path]:
    """A new empty folder in an existing one; it and what is left in it is gone afterwards.

    Raises:
        DiskProblem: the disk is full, or may not be written.
    """
    with disk_errors(parent):
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=prefix, suffix=suffix))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; on success it is fsynced and renamed, on failure removed.

    Raises:
        DiskProblem: the disk is full, or may not be written.
    """
    with disk_errors(path):
        make_folder(path.parent)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            # Windows flushes only descriptors that are open for writing.
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes a whole file so that a reader sees the old one or the new one, never a part.

    Raises:
        DiskProblem: the disk is full, or may not be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a power cut, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
