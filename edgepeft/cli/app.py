"""The command tree, and how an error leaves the program."""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer

from edgepeft.cli import (
    adapters,
    chat,
    config,
    data,
    demo,
    doctor,
    evaluate,
    fits,
    methods,
    models,
    on_terminal,
    open_ui,
    plan,
    profiles,
    runs,
    train,
    where,
)
from edgepeft.cli.output import stderr
from edgepeft.errors import EdgepeftError, ExitCode

_PREFIX = "edgepeft: "
"""What an error begins with."""

app = typer.Typer(
    name="edgepeft",
    help="Fine-tune adapters on one consumer GPU, offline, with the memory peak predicted and kept.",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.add_typer(models.app, name="models")
app.add_typer(data.app, name="data")
app.add_typer(runs.app, name="runs")
app.add_typer(adapters.app, name="adapters")
app.add_typer(methods.app, name="methods")
app.add_typer(profiles.app, name="profiles")
app.add_typer(config.app, name="config")
app.add_typer(config.cache_app, name="cache")
app.command("doctor")(doctor.doctor)
app.command("plan")(plan.plan)
app.command("fits")(fits.fits)
app.command("train")(train.train)
app.command("chat")(chat.chat)
app.command("eval")(evaluate.evaluate)
app.command("demo")(demo.demo)
app.command("where")(where.where)


@app.command("ui")
def ui() -> None:
    """Open the terminal UI."""
    open_ui()


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", "-V", help="Print the version.")] = False,
) -> None:
    """Fine-tune adapters on one consumer GPU, offline, with the memory peak predicted and kept."""
    if debug:
        os.environ["EDGEPEFT_DEBUG"] = "1"
    if version:
        from edgepeft import __version__

        typer.echo(f"edgepeft {__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        if on_terminal():
            open_ui()
        else:
            typer.echo(context.get_help())


def run(arguments: list[str]) -> None:
    """Runs one command line and exits with the code that its outcome has."""
    try:
        code = app(args=arguments, standalone_mode=False)
        sys.stdout.flush()
    except EdgepeftError as error:
        _fail(error.lines(_PREFIX, stderr.width), error, error.exit_code)
    except typer.Abort:
        sys.exit(ExitCode.INTERRUPTED)
    except typer.TyperException as error:
        said = " ".join(str(error).rstrip(". ").split())
        _fail([f"{_PREFIX}{said}. Add --help to see what there is."], error, ExitCode.USAGE)
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        _leave_closed_pipe()
    except SystemExit as leaving:
        # Typer turns a closed pipe into code 1 by itself.
        if isinstance(leaving.__context__, BrokenPipeError):
            _leave_closed_pipe()
        raise
    except Exception as error:  # noqa: BLE001 - the last line of defence: a bug of ours is told in one line too
        said = " ".join(f"{type(error).__name__}: {error}".split())
        line = f"{_PREFIX}internal error: {said}. Run it again with --debug for the traceback."
        _fail([line], error, ExitCode.BUG)
    sys.exit(code if isinstance(code, int) else ExitCode.DONE)


def _leave_closed_pipe() -> NoReturn:
    """The reader of a pipe went away: there is nobody left to tell."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
    sys.exit(ExitCode.DONE)


def _fail(lines: list[str], error: Exception, code: ExitCode) -> NoReturn:
    if os.environ.get("EDGEPEFT_DEBUG"):
        import traceback

        traceback.print_exception(error)
    for line in lines:
        stderr.print(line, markup=False, style=None)
    sys.exit(code)
