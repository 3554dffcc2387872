"""`audit.jsonl` beside the versions of an adapter: what happened to them, by whom; lines are only added."""

from __future__ import annotations

import os
from datetime import UTC, datetime

import msgspec

from edgepeft.paths import home

AUDIT_FILE = "audit.jsonl"


class AuditLine(msgspec.Struct, frozen=True):
    """One line of audit.jsonl."""

    time: str
    """ISO 8601, UTC."""
    user: str
    action: str
    """published, composed, averaged, imported, rolled back or removed."""
    version: int
    detail: str = ""


def read_audit(name: str) -> list[AuditLine]:
    """What happened to `name`, oldest first; undecodable lines are skipped."""
    path = home().adapters / name / AUDIT_FILE
    lines: list[AuditLine] = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            lines.append(msgspec.json.decode(line, type=AuditLine))
        except msgspec.DecodeError:
            continue
    return lines


def write_audit(name: str, action: str, version: int, detail: str = "") -> None:
    """Adds a line, and waits until it is on disk.

    Raises:
        OSError: the disk is full, or may not be written.
    """
    entry = AuditLine(datetime.now(UTC).isoformat(timespec="seconds"), _user(), action, version, detail)
    path = home().adapters / name / AUDIT_FILE
    with path.open("ab") as file:
        file.write(msgspec.json.encode(entry) + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return "unknown"
