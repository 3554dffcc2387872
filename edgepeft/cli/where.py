"""`edgepeft where`: the folders in force and what they hold."""

from __future__ import annotations

import os

from edgepeft.cli.output import JsonFlag, line, print_json, row, table
from edgepeft.cli.output import console as out


def where(as_json: JsonFlag = False) -> None:
    """Show the folders that edgepeft uses, with their sizes."""
    from edgepeft.paths import measure_size, places
    from edgepeft.units import format_bytes

    sizes = {name: measure_size(path) for name, path in places().items()}
    if as_json:
        print_json(
            {
                name: {"path": str(path), "bytes": None if (size := sizes[name]) is None else size.size_bytes}
                for name, path in places().items()
            }
        )
        return
    grid = table("what", "size", "where", right=("size",))
    for name, path in places().items():
        size = sizes[name]
        row(grid, name, "–" if size is None else format_bytes(size.size_bytes), str(path))
    out.print(grid)
    if not os.environ.get("EDGEPEFT_HOME"):
        line("Set EDGEPEFT_HOME to keep everything in one folder of your choice.", "dim")
