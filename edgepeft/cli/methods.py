"""`edgepeft methods`: the PEFT methods and their options."""

from __future__ import annotations

from typing import Annotated

import typer

from edgepeft.cli.output import JsonFlag, line, print_json, row, table
from edgepeft.cli.output import console as out

app = typer.Typer(no_args_is_help=True, help="List the PEFT methods and their options.")


@app.command("list")
def list_(as_json: JsonFlag = False) -> None:
    """List every method."""
    from edgepeft.methods import METHODS

    if as_json:
        print_json(
            [
                {
                    "id": name,
                    "paper": method.PAPER,
                    "peft": method.PEFT_TYPE,
                    "adds": method.ADDS,
                    "merges": method.MERGES,
                }
                for name, method in METHODS.items()
            ]
        )
        return
    grid = table("id", "adds", "in PEFT", "merges", "paper")
    for name, method in METHODS.items():
        row(grid, name, method.ADDS, method.PEFT_TYPE or "–", "yes" if method.MERGES else "no", method.PAPER)
    out.print(grid)


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="Method id, as `methods list` shows it.")], as_json: JsonFlag = False
) -> None:
    """Explain one method and its options."""
    import inspect

    from edgepeft.errors import UsageError
    from edgepeft.methods import METHODS

    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}", where="methods", hint="Known: " + ", ".join(METHODS))
    text = inspect.getdoc(METHODS[name]) or name
    if as_json:
        print_json({"id": name, "text": text})
    else:
        line(text)
