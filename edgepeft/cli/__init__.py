"""The command line: one module a command group, and one place where errors become exit codes."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of `edgepeft`; answers `--version` before anything else is imported."""
    if sys.argv[1:] in (["--version"], ["-V"]):
        from edgepeft import __version__

        sys.stdout.write(f"edgepeft {__version__}\n")
        return
    from edgepeft.cli.app import run

    run(sys.argv[1:])
