"""A worker that the system killed, or whose card failed, is started again once, with a smaller layout.

Whoever follows a run may call it; the first one does it, and a run is resumed so only once until a person resumes it.
"""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Literal

from edgepeft.errors import ExitCode
from edgepeft.paths import disk_errors
from edgepeft.runs.control import read_request
from edgepeft.runs.launch import exit_code_of, restart_smaller
from edgepeft.runs.layout import RunFolder
from edgepeft.runs.state import RunState

Ending = Literal["killed", "device"]
"""How a worker ended: by SIGKILL, which is how Linux ends a process that takes too much memory, or with a card that
failed."""
_WORKING = ("train", "evaluate", "save")
KILLED_CODES = (-int(getattr(signal, "SIGKILL", 9)), 128 + 9)


def ending_of(run: RunFolder, state: RunState) -> Ending | None:
    """How the worker of a run that it was seen to work for ended, if that is worth a second start.

    Args:
        run: the run, whose worker lived a moment ago.
        state: of it now.

    Returns:
        None for every other ending: finished, stopped, failed for a reason that a smaller layout does not change, or
        while somebody waits for it to stop.
    """
    # Before the first trial no layout has had any part in it.
    if state.phase not in _WORKING or read_request(run) in ("stop", "pause"):
        return None
    if state.status == "failed" and state.exit_code == ExitCode.DEVICE:
        return "device"
    if state.status != "lost":
        return None
    try:
        code = exit_code_of(run)
    except subprocess.TimeoutExpired:
        return None
    # Of a process that another one started nobody learns more than that it ended without a word.
    return "killed" if code is None or code in KILLED_CODES else None


def rescue(run: RunFolder, ending: Ending) -> bool:
    """Resumes the run with the next smaller layout; False when that was done before, by this process or another.

    Raises:
        EdgepeftError: the worker does not start.
    """
    if not claim(run):
        return False
    restart_smaller(run, ending)
    return True


def claim(run: RunFolder) -> bool:
    """Takes the one rescue of a run; False when it is taken already."""
    with disk_errors(run.rescued_file):
        try:
            os.close(os.open(run.rescued_file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            return False
    return True
