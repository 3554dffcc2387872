"""What makes two stores hold the same base: SHA-256 over the contents of the weight files, whatever their names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from edgepeft.errors import BadInput
from edgepeft.paths import home, write_atomic
from edgepeft.units import MIB

_BLOCK = 8 * MIB


class _CachedHash(msgspec.Struct, frozen=True):
    """A file's SHA-256 with what tells whether the file is still the same."""

    path: str
    """The file, resolved."""
    size: int
    """Its bytes."""
    mtime_ns: int
    """Its last change."""
    inode: int
    """Its inode; 0 where the system has none."""
    sha256: str
    """Hexadecimal digest of its content."""


def fingerprint_files(files: Sequence[Path], progress: Callable[[str, float | None], None] | None = None) -> str:
    """`sha256:…` over the sorted SHA-256 digests of `files`; the same for a copy under other names.

    Digests are cached by path, size, time and inode, so that a file is read once.

    Raises:
        BadInput: a file cannot be read.
    """
    sizes = [_stat(path).st_size for path in files]
    total, before = max(1, sum(sizes)), 0
    digests = []
    for path, size in zip(files, sizes, strict=True):

        def report(done: int, start: int = before) -> None:
            if progress is not None:
                progress("fingerprint", (start + done) / total)

        digests.append(hash_file(path, report))
        before += size
    return "sha256:" + hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def hash_file(path: Path, report: Callable[[int], None] | None = None) -> str:
    """The SHA-256 of a file's content as hexadecimal digits, from the cache when the file has not changed.

    Args:
        report: called with the bytes read so far.

    Raises:
        BadInput: the file cannot be read.
    """
    real = path.resolve()
    stat = _stat(real)
    entry = home().cache / "hashes" / (hashlib.sha256(str(real).encode()).hexdigest()[:40] + ".json")
    cached = _read_cached(entry)
    signature = (str(real), stat.st_size, stat.st_mtime_ns, stat.st_ino)
    if cached is not None and (cached.path, cached.size, cached.mtime_ns, cached.inode) == signature:
        return cached.sha256
    digest = hashlib.sha256()
    done = 0
    try:
        with real.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                done += len(block)
                if report is not None:
                    report(done)
    except OSError as error:
        raise _unreadable(path, error) from error
    after = _stat(real)
    if (after.st_size, after.st_mtime_ns) != (stat.st_size, stat.st_mtime_ns):
        raise BadInput(
            "the file changed while it was read", where=str(path), hint="Wait until it is complete, then try again"
        )
    write_atomic(entry, msgspec.json.encode(_CachedHash(*signature, sha256=digest.hexdigest())))
    return digest.hexdigest()


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_cached(entry: Path) -> _CachedHash | None:
    try:
        return msgspec.json.decode(entry.read_bytes(), type=_CachedHash)
    except (OSError, msgspec.MsgspecError):
        return None


def _unreadable(path: Path, error: OSError) -> BadInput:
    return BadInput(f"cannot be read: {error.strerror}", where=str(path), hint="Check the path and its permissions")
