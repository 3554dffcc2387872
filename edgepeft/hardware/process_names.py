"""Names of processes as people know them."""

from __future__ import annotations

from collections.abc import Sequence

_WORKERS = "edgepeft.engine.workers."


def process_name(pid: int) -> str:
    """The program's name; `edgepeft train` for one of our workers; `process 123` when the system does not tell."""
    import psutil

    try:
        process = psutil.Process(pid)
        name = str(process.name())
    except psutil.Error:
        return f"process {pid}"
    try:
        return name_from_command(process.cmdline(), name)
    except psutil.Error:
        return name


def name_from_command(command: Sequence[str], name: str) -> str:
    """`edgepeft NAME` when the command line starts one of our workers, else the program's own name."""
    for argument in command:
        if argument.startswith(_WORKERS):
            return f"edgepeft {argument.removeprefix(_WORKERS)}"
    return name
