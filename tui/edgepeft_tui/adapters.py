"""What the Adapters screen shows, read from the library in a thread and turned into plain data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgepeft.errors import EdgepeftError
from edgepeft.units import format_bytes

if TYPE_CHECKING:
    from edgepeft.library.store import AdapterFolder

_FIRST_ROWS = 48
"""Read before the first are shown: a screenful."""
_SECONDS = 0.1
"""Between two parts that are shown while more is read."""


class AdapterRow(msgspec.Struct, frozen=True):
    """One version of an adapter."""

    name: str
    version: int
    """0 where a name has none."""
    versions: int = 1
    """How many there are of the name."""
    base: str = ""
    method: str = ""
    size_bytes: int = 0
    loss: float | None = None
    """On held-out data."""
    accuracy: float | None = None
    """Share of answers' fields that were right, where the card has it."""
    made: str = ""
    """ISO 8601; empty where it was not made here."""
    trouble: str = ""
    """Why it cannot be used."""

    @property
    def reference(self) -> str:
        """`NAME@vK`."""
        return f"{self.name}@v{self.version}" if self.version else self.name


class Facts(msgspec.Struct, frozen=True):
    """All that is known of one version."""

    reference: str
    lines: tuple[tuple[str, str], ...]
    """What a line is about, and the line."""
    changed: tuple[tuple[str, str], ...] = ()
    """Parameters that it changes, by kind."""
    audit: tuple[str, ...] = ()
    """What happened to the name, newest first."""
    trouble: str = ""


class Compared(msgspec.Struct, frozen=True):
    """One thing that two adapters have."""

    what: str
    left: str
    right: str

    @property
    def differs(self) -> bool:
        """Whether they have it differently."""
        return self.left != self.right


_rows: dict[Path, tuple[tuple[int, ...], AdapterRow]] = {}
"""Versions that were read, with the times of their files: a version is not changed once it is there."""


def read_library() -> Iterator[tuple[tuple[AdapterRow, ...], bool]]:
    """The newest version of every name, in parts: rows by name, and whether they are all.

    Raises:
        OSError: the library's folder cannot be read.
    """
    from edgepeft.library.store import library_names

    told, waiting, first = time.monotonic(), list[AdapterRow](), True
    for name in library_names():
        row = read_newest(name)
        if row is not None:
            waiting.append(row)
        if len(waiting) >= _FIRST_ROWS and (first or time.monotonic() - told >= _SECONDS):
            yield tuple(waiting), False
            told, waiting, first = time.monotonic(), [], False
    yield tuple(waiting), True


def read_newest(name: str) -> AdapterRow | None:
    """The newest version of a name, whole or broken; None where it has none."""
    from edgepeft.library.store import versions_of

    try:
        versions = versions_of(name)
    except OSError as error:
        return AdapterRow(name, 0, 0, trouble=f"cannot be read: {error.strerror or error}")
    return read_version(name, versions[-1], len(versions)) if versions else None


def read_versions(name: str) -> tuple[AdapterRow, ...]:
    """Every version of a name, newest first."""
    from edgepeft.library.store import versions_of

    try:
        versions = versions_of(name)
    except OSError:
        return ()
    return tuple(read_version(name, version, len(versions)) for version in reversed(versions))


def read_version(name: str, version: int, versions: int = 1) -> AdapterRow:
    """One version; what is wrong with it is in its `trouble`."""
    from edgepeft.library.store import WEIGHTS_FILE, open_adapter
    from edgepeft.paths import home

    folder = home().adapters / name / f"v{version}"
    stamp = tuple(_changed(folder / file) for file in ("adapter_config.json", "card.json", WEIGHTS_FILE))
    known = _rows.get(folder)
    if known is None or known[0] != stamp:
        try:
            row = _row_of(open_adapter(folder, name, version))
        except (EdgepeftError, OSError) as error:
            what = error.what if isinstance(error, EdgepeftError) else str(error)
            row = AdapterRow(name, version, trouble=what)
        known = _rows[folder] = (stamp, row)
    return msgspec.structs.replace(known[1], versions=versions)


def read_facts(reference: str) -> Facts:
    """Card, changed parameters and audit of `NAME@vK`; a broken one tells why it is."""
    from edgepeft.library.audit import read_audit
    from edgepeft.library.card_text import adapter_lines, audit_text, changed_groups
    from edgepeft.library.store import resolve_adapter
    from edgepeft.models.headers import read_header

    name = reference.partition("@")[0]
    try:
        audit = tuple(audit_text(entry) for entry in reversed(read_audit(name)))
    except OSError:
        audit = ()
    try:
        adapter = resolve_adapter(reference)
        groups = changed_groups(read_header(adapter.weights))
        lines = (*adapter_lines(adapter), ("size", format_bytes(adapter.weights.stat().st_size)))
    except (EdgepeftError, OSError) as error:
        return Facts(reference, (("adapter", reference),), audit=audit, trouble=str(error))
    changed = tuple(
        (group.where, f"layers {group.layers}  {group.shapes}  {group.entries:,} entries") for group in groups
    )
    return Facts(reference, lines, changed, audit)


def compare(left: str, right: str) -> tuple[Compared, ...]:
    """Two versions side by side: whatever one of them says.

    Raises:
        BadInput: one of them is broken.
    """
    from edgepeft.library.card_text import adapter_lines
    from edgepeft.library.store import resolve_adapter

    def told(reference: str) -> dict[str, str]:
        adapter = resolve_adapter(reference)
        found: dict[str, str] = {}
        for what, text in (*adapter_lines(adapter), ("size", format_bytes(adapter.weights.stat().st_size))):
            if what in ("adapter", "folder"):
                continue
            found[what] = f"{found[what]}; {text}" if what in found else text
        return found

    ours, theirs = told(left), told(right)
    return tuple(Compared(what, ours.get(what, "–"), theirs.get(what, "–")) for what in dict.fromkeys([*ours, *theirs]))


def lost_with(reference: str) -> str:
    """What removing `NAME` or `NAME@v2` loses, as a sentence.

    Raises:
        BadInput: there is no such adapter.
    """
    from edgepeft.library.store import removable
    from edgepeft.paths import home, measure_size

    name, _, doomed = removable(reference)
    folders = [home().adapters / name / one.rpartition("@")[2] for one in doomed]
    size = sum(found.size_bytes for folder in folders if (found := measure_size(folder)) is not None)
    if len(doomed) == 1:
        return f"{doomed[0]} ({format_bytes(size)}) is deleted for good; its line in the audit stays."
    versions = ", ".join(one.rpartition("@")[2] for one in doomed)
    return f"All {len(doomed)} versions of {name} ({versions}; {format_bytes(size)}) are deleted for good."


def _row_of(adapter: AdapterFolder) -> AdapterRow:
    card, metrics = adapter.card, adapter.card.metrics if adapter.card else {}
    return AdapterRow(
        name=adapter.name or "",
        version=adapter.version or 0,
        base=card.base if card else str(adapter.config.get("base_model_name_or_path") or ""),
        method=adapter.method,
        size_bytes=adapter.weights.stat().st_size,
        loss=metrics.get("eval_loss"),
        accuracy=metrics.get("field_accuracy"),
        made=card.created if card else "",
    )


def _changed(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0
