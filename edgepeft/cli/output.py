"""What every command uses to speak: tables and lines on stdout, `--json`, and one line on stderr when it fails."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from edgepeft.library.combine_text import Said


class PipeConsole(Console):
    """A console that leaves a closed pipe to the command line's own handler; rich would end with code 1."""

    def on_broken_pipe(self) -> None:
        """Called by rich while it handles the error; `edgepeft … | head` is no failure."""
        raise BrokenPipeError


console = PipeConsole(highlight=False, soft_wrap=True)
"""For people: stdout."""
stderr = Console(stderr=True, highlight=False, soft_wrap=True)
"""Progress, notes and errors."""

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def print_json(value: Any) -> None:
    """Writes any msgspec-encodable value as indented JSON to stdout."""
    sys.stdout.write(json.dumps(msgspec.to_builtins(value), indent=2, ensure_ascii=False) + "\n")


def line(text: str = "", style: str | None = None) -> None:
    """One line on stdout; brackets in `text` are never markup."""
    console.print(Text(text, style=style or ""))


def note(text: str, style: str | None = "dim") -> None:
    """One line on stderr, so that stdout stays clean for pipes."""
    stderr.print(Text(text, style=style or ""))


def tell_lines(lines: Sequence[Said]) -> None:
    """What came of some work on stdout: the first line, and the others set in below it."""
    for number, said in enumerate(lines):
        line(f"  {said.text}" if number else said.text, "yellow" if said.careful else None)


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """A borderless table; columns named in `right` are right-aligned."""
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        grid.add_column(Text(column), justify="right" if column in right else "left", overflow="fold")
    return grid


def row(grid: Table, *cells: str) -> None:
    """Adds a row of plain text; brackets are never markup."""
    grid.add_row(*(Text(cell) for cell in cells))


def interactive() -> bool:
    """Whether a person sits at a terminal."""
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
