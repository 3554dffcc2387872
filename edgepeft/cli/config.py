"""`edgepeft config` and `edgepeft cache`: the user's settings, and what can be deleted at any time."""

from __future__ import annotations

from typing import Annotated

import typer

from edgepeft.cli.output import JsonFlag, line, print_json, row, table
from edgepeft.cli.output import console as out

app = typer.Typer(no_args_is_help=True, help="Show and change settings.")
cache_app = typer.Typer(no_args_is_help=True, help="Show and clear the cache.")


@app.command("show")
def show(as_json: JsonFlag = False) -> None:
    """Show every setting in force."""
    import msgspec

    from edgepeft.paths import home
    from edgepeft.settings import settings, stored_settings

    in_force = msgspec.structs.asdict(settings())
    if as_json:
        print_json(in_force)
        return
    stored = msgspec.structs.asdict(stored_settings())
    grid = table("setting", "value", "from")
    keys = in_force.pop("keys")
    for action, value in keys.items():
        row(grid, f"keys.{action}", value, "config.toml")
    for key, value in in_force.items():
        origin = "default" if value is None else "config.toml" if value == stored[key] else "environment"
        row(grid, key, "–" if value is None else str(value), origin)
    out.print(grid)
    line(f"File: {home().config_file}", "dim")


@app.command("set")
def set_(
    key: Annotated[str, typer.Argument(help="Setting to change.")],
    value: Annotated[str, typer.Argument(help="New value; empty removes the setting.")],
    as_json: JsonFlag = False,
) -> None:
    """Change one setting in config.toml."""
    from edgepeft.settings import store_setting

    store_setting(key, value or None)
    if as_json:
        print_json({key: value or None})
        return
    line(f"{key} = {value}" if value else f"{key} removed")


@cache_app.command("show")
def cache_show(as_json: JsonFlag = False) -> None:
    """Show what the cache holds."""
    from edgepeft.paths import home
    from edgepeft.units import format_bytes

    cache = home().cache
    sizes = {
        entry.name: sum(file.stat().st_size for file in entry.rglob("*") if file.is_file())
        if entry.is_dir()
        else entry.stat().st_size
        for entry in (sorted(cache.iterdir()) if cache.is_dir() else [])
    }
    if as_json:
        print_json({"path": str(cache), "bytes": sizes})
        return
    for name, size in sizes.items():
        line(f"{format_bytes(size):>10}  {name}")
    line(f"{format_bytes(sum(sizes.values()))} in {cache}", "dim")


@cache_app.command("clear")
def cache_clear(as_json: JsonFlag = False) -> None:
    """Delete the cache; it is made again when needed."""
    import shutil

    from edgepeft.paths import disk_errors, home

    cache = home().cache
    with disk_errors(cache):
        if cache.is_dir():
            shutil.rmtree(cache)
    if as_json:
        print_json({"cleared": str(cache)})
    else:
        line(f"Cleared {cache}")
