"""`edgepeft where`: the folders in force and what they hold."""

from __future__ import annotations

import os
from pathlib import Path

from edgepeft.cli.output import JsonFlag, line, print_json, row, table
from edgepeft.cli.output import console as out


def where(as_json: JsonFlag = False) -> None:
    """Show the folders that edgepeft uses, with their sizes."""
    from edgepeft.paths import builtin_profiles, home
    from edgepeft.units import format_bytes

    folders = home()
    places: dict[str, Path] = {
        "models": folders.models,
        "adapters": folders.adapters,
        "runs": folders.runs,
        "cache": folders.cache,
        "settings": folders.config_file,
        "own profiles": folders.profiles,
        "shipped profiles": builtin_profiles(),
    }
    sizes = {name: _size_bytes(path) for name, path in places.items()}
    if as_json:
        print_json({name: {"path": str(path), "bytes": sizes[name]} for name, path in places.items()})
        return
    grid = table("what", "size", "where", right=("size",))
    for name, path in places.items():
        size = sizes[name]
        row(grid, name, "–" if size is None else format_bytes(size), str(path))
    out.print(grid)
    if not os.environ.get("EDGEPEFT_HOME"):
        line("Set EDGEPEFT_HOME to keep everything in one folder of your choice.", "dim")


def _size_bytes(path: Path) -> int | None:
    if path.is_file():
        return path.stat().st_size
    if not path.is_dir():
        return None
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())
