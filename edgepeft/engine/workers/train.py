"""`python -m edgepeft.engine.workers.train RUN_FOLDER [--smaller killed|device] [--old-data]`: executes the run's plan.

What happens is told in the run's events.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from edgepeft.errors import BadInput, DeviceUnusable, DiskProblem, EdgepeftError, ExitCode, OutOfMemory
from edgepeft.runs.events import Cause, Event, Failed, Started, StepDone
from edgepeft.runs.events_file import EventWriter
from edgepeft.runs.layout import RunFolder
from edgepeft.runs.lock import RunLock


def main(arguments: list[str] | None = None) -> int:
    """Holds the run's lock, trains, and returns the exit code; stdout and stderr are the run's log."""
    parser = argparse.ArgumentParser(prog="train")
    parser.add_argument("run", type=Path, help="run folder with a plan.json")
    parser.add_argument(
        "--smaller", choices=("killed", "device"), help="begin with a smaller layout: how the worker before this ended"
    )
    parser.add_argument(
        "--old-data", action="store_true", help="go on with cached tokens of data files that changed or are gone"
    )
    given = parser.parse_args(arguments)
    run = RunFolder(given.run.absolute())
    try:
        if not run.plan_file.is_file():
            raise BadInput("this folder holds no run", where=str(run.path), hint="A run folder has a plan.json")
        # The lock comes before the slow imports: the launcher waits for it.
        with RunLock(run), EventWriter(run.events_file) as events:
            return _train(run, events, given.smaller, old_data=given.old_data)
    except EdgepeftError as error:
        # Nothing can be told in the folder: another worker has it, or the disk refuses.
        sys.stderr.write(f"{error}\n")
        return error.exit_code


def _train(run: RunFolder, events: EventWriter, smaller: Cause | None, *, old_data: bool) -> int:
    step = 0

    def emit(event: Event) -> None:
        nonlocal step
        if isinstance(event, StepDone | Started):
            step = event.step
        events.write(event)

    try:
        _execute(run, emit, smaller, old_data=old_data)
        return ExitCode.DONE
    except Exception as error:  # noqa: BLE001 - the last line of defence: whatever it is, the run's events must say it
        traceback.print_exc()
        known = _explain(error)
        message = str(known) if known is not None else f"{type(error).__name__}: {error}"
        code = known.exit_code if known is not None else ExitCode.BUG
        trace = "" if known is not None else traceback.format_exc()
        events.write(Failed(message=message, exit_code=code, step=step, traceback=trace))
        return code


def _execute(run: RunFolder, emit: Callable[[Event], None], smaller: Cause | None, *, old_data: bool) -> None:
    # Libraries' remarks about kernels and hubs belong into no run's log.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    from edgepeft.engine.training.stopping import StopRequests

    requests = StopRequests(run)
    # Before torch is imported: whoever stops the run in its first seconds finds it stopped, not lost.
    with requests.catch_signals():
        from edgepeft.engine.training.loop import run_training

        # The libraries' own objects are never collected: neither the collector nor the ledger need look at them again.
        gc.freeze()
        run_training(run, emit, requests, smaller=smaller, old_data=old_data)


def _explain(error: Exception) -> EdgepeftError | None:
    """The error as a person can use it; None for a bug of ours."""
    if isinstance(error, EdgepeftError):
        return error
    from edgepeft.engine.training.recovery import is_device_failure, is_out_of_memory

    if is_out_of_memory(error):
        return OutOfMemory("memory ran out", hint="Resume when more memory is free, or plan with a smaller --budget")
    if is_device_failure(error):
        what = str(error).splitlines()[0]
        return DeviceUnusable(what, hint="Look at `edgepeft doctor`, then resume the run from its last checkpoint")
    if isinstance(error, OSError):
        where = str(error.filename or "")
        return DiskProblem(error.strerror or str(error), where=where, hint="Check the disk, then resume the run")
    return None


if __name__ == "__main__":
    sys.exit(main())
