"""The tables of adapters and of versions, and how a version is written into them."""

from __future__ import annotations

from edgepeft.units import format_bytes
from edgepeft_tui.adapters import AdapterRow
from edgepeft_tui.widgets.lines import NOTHING, Column, Line, Lines


def names_table() -> Lines:
    """The newest version of each name."""
    columns = (
        Column("adapter", most=36),
        Column("newest", right=True, leaves=1),
        Column("versions", right=True, leaves=4),
        Column("method", most=16),
        Column("size", right=True),
        Column("held out", right=True, leaves=2),
        Column("fields", right=True, leaves=6, rare=True),
        Column("base", most=26, leaves=5),
        Column("made", most=16, leaves=7),
    )
    return Lines(
        columns,
        id="adapters",
        classes="frame",
        title="Adapters",
        empty="reading …",
        help="Every adapter by its name, with its newest version. Held out is the loss on held-out data.",
    )


def versions_table() -> Lines:
    """All versions of one name."""
    columns = (
        Column("version", right=True),
        Column("method", most=16),
        Column("size", right=True),
        Column("held out", right=True, leaves=1),
        Column("made", most=16, leaves=2),
        Column("base", most=26, leaves=3),
    )
    return Lines(
        columns,
        id="versions",
        classes="frame",
        title="Versions (v)",
        help="All versions of the adapter above, newest first. Roll back makes an older one the newest again.",
    )


def searched(row: AdapterRow) -> str:
    """What the filter looks at, in small letters."""
    return f"{row.name} {row.base} {row.method} {'damaged' if row.trouble else ''}".lower()


def name_line(row: AdapterRow) -> Line:
    """A name with its newest version."""
    newest, versions = f"v{row.version}" if row.version else NOTHING, str(row.versions or NOTHING)
    if row.trouble:
        return Line(
            row.name,
            (row.name, newest, versions, "damaged", NOTHING, NOTHING, NOTHING, row.trouble, NOTHING),
            trouble=True,
        )
    return Line(row.name, (row.name, newest, versions, *_figures(row), row.base or "n/a", _day(row.made)))


def version_line(row: AdapterRow) -> Line:
    """One version of a name."""
    if row.trouble:
        return Line(row.reference, (f"v{row.version}", "damaged", NOTHING, NOTHING, NOTHING, row.trouble), trouble=True)
    method, size, loss, _ = _figures(row)
    return Line(row.reference, (f"v{row.version}", method, size, loss, _day(row.made), row.base or "n/a"))


def _figures(row: AdapterRow) -> tuple[str, str, str, str]:
    loss = NOTHING if row.loss is None else f"{row.loss:.3f}"
    accuracy = NOTHING if row.accuracy is None else f"{100 * row.accuracy:.1f} %"
    return row.method, format_bytes(row.size_bytes), loss, accuracy


def _day(made: str) -> str:
    return made[:16].replace("T", " ") or "imported"
