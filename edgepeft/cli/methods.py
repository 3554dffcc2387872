"""`edgepeft methods`: the PEFT methods and their options."""

from __future__ import annotations

import itertools
from typing import Annotated, Any

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
                    "paper": method.paper,
                    "peft": method.peft_type,
                    "adds": method.adds,
                    "merges": method.merges,
                }
                for name, method in METHODS.items()
            ]
        )
        return
    grid = table("id", "adds", "in PEFT", "merges", "paper")
    for name, method in METHODS.items():
        row(grid, name, method.adds, method.peft_type or "–", "yes" if method.merges else "no", method.paper)
    out.print(grid)


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="Method id, as `methods list` shows it.")], as_json: JsonFlag = False
) -> None:
    """Explain one method and its options."""
    import inspect
    import sys

    from edgepeft.errors import UsageError
    from edgepeft.methods import METHODS

    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}", where="methods", hint="Known: " + ", ".join(METHODS))
    method = METHODS[name]
    text = inspect.getdoc(sys.modules[type(method).__module__]) or name
    options = [
        {"field": field.name, "default": _default(field), "what": what} for field, what in _fields(method.config_type)
    ]
    if as_json:
        print_json({"id": name, "text": text, "settings": options})
        return
    line(text)
    if options:
        line()
        line(f"Settings, as in: edgepeft train … --method {name} --set {options[0]['field']}=…", "bold")
        grid = table("field", "default", "what")
        for option in options:
            default = option["default"]
            shown = ", ".join(default) or "none" if isinstance(default, tuple | dict) else str(default)
            row(grid, option["field"], shown, option["what"])
        out.print(grid)


def _default(field: Any) -> Any:
    import msgspec

    return field.default if field.default is not msgspec.NODEFAULT else field.default_factory()


def _fields(kind: Any) -> list[tuple[Any, str]]:
    """A config's fields, each with the docstring under it."""
    import ast
    import inspect
    import textwrap

    import msgspec

    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    told: dict[str, str] = {}
    for statement, after in itertools.pairwise(body.body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            told[statement.target.id] = " ".join(str(after.value.value).split())
    return [(field, told.get(field.name, "")) for field in msgspec.structs.fields(kind)]
