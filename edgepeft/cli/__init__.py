"""The command line: one module a command group, and one place where errors become exit codes."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of `edgepeft`; `--version` and the terminal UI do not wait for the command line's imports."""
    if sys.argv[1:] in (["--version"], ["-V"]):
        from edgepeft import __version__

        sys.stdout.write(f"edgepeft {__version__}\n")
        return
    if not sys.argv[1:] and on_terminal():
        open_ui()
        return
    from edgepeft.cli.app import run

    run(sys.argv[1:])


def on_terminal() -> bool:
    """Whether a person reads and types here."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def open_ui() -> None:
    """Opens the terminal UI; the one place where the library's side knows it."""
    from edgepeft_tui.app import run_app

    run_app()
