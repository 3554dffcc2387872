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
    from edgepeft.settings import settings, shown_settings

    if as_json:
        print_json(msgspec.structs.asdict(settings()))
        return
    grid = table("setting", "value", "from")
    for shown in shown_settings():
        row(grid, shown.key, "–" if shown.value is None else shown.value, shown.origin)
    out.print(grid)
    line(f"File: {home().config_file}", "dim")


@app.command("set")
def set_(
    key: Annotated[str, typer.Argument(help="Setting to change.")],
    value: Annotated[str, typer.Argument(help="New value; empty removes the setting.")],
    as_json: JsonFlag = False,
) -> None:
    """Change one setting in config.toml."""
    from edgepeft.settings import check_setting, store_setting

    if value:
        check_setting(key, value)
    store_setting(key, value or None)
    if as_json:
        print_json({key: value or None})
        return
    line(f"{key} = {value}" if value else f"{key} removed")


@cache_app.command("show")
def cache_show(as_json: JsonFlag = False) -> None:
    """Show what the cache holds."""
    from edgepeft.paths import home, measure_size
    from edgepeft.units import format_bytes

    cache = home().cache
    found = {entry.name: measure_size(entry) for entry in (sorted(cache.iterdir()) if cache.is_dir() else [])}
    sizes = {name: size.size_bytes for name, size in found.items() if size is not None}
    if as_json:
        print_json({"path": str(cache), "bytes": sizes})
        return
    for name, size in sizes.items():
        line(f"{format_bytes(size):>10}  {name}")
    line(f"{format_bytes(sum(sizes.values()))} in {cache}", "dim")


@cache_app.command("clear")
def cache_clear(as_json: JsonFlag = False) -> None:
    """Delete the cache; it is made again when needed."""
    from edgepeft.paths import clear_cache

    cache = clear_cache()
    if as_json:
        print_json({"cleared": str(cache)})
    else:
        line(f"Cleared {cache}")
