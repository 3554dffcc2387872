"""Starting, resuming, stopping and removing runs. Training is a detached process that outlives its launcher."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from edgepeft.errors import BadInput, DeviceUnusable, DiskProblem, UsageError, error_for_code
from edgepeft.library.store import check_same_base
from edgepeft.paths import check_name, disk_errors, home, write_atomic
from edgepeft.plan.revise import check_fits
from edgepeft.plan.train_plan import TrainPlan
from edgepeft.processes import start_worker
from edgepeft.runs.control import FORCE_HINT, clear_request, request
from edgepeft.runs.events import Finished
from edgepeft.runs.layout import RunFolder, create_run
from edgepeft.runs.lock import is_locked
from edgepeft.runs.state import START_SECONDS, Launched, RunState, RunWatch, events_bytes, read_launched, read_state
from edgepeft.spec import RunSpec
from edgepeft.units import MIB, format_bytes, format_seconds

WORKER = "train"
_POLL_SECONDS = 0.05
_SPARE_DISK_BYTES = 64 * MIB
_TERMINATE_SECONDS = 10.0
_REAP_SECONDS = 5.0
_children: list[subprocess.Popen[bytes]] = []
"""Workers of this process, kept so that an ended one is reaped and never a zombie for long."""


def launch(plan: TrainPlan, name: str) -> RunFolder:
    """Makes the run folder NAME-K, starts its worker detached and waits until that holds the run's lock.

    Raises:
        UsageError: `name` cannot be used as a name.
        BadInput: `name` is an adapter over another base, the plan names no data or data that is gone, or the worker
            refused the plan at once.
        DeviceUnusable: the plan is for a card that is not in this machine.
        DoesNotFit: it needs more than its budget.
        DiskProblem: too little space for the adapter and its checkpoints, or no permission.
    """
    check_name(name)
    check_runs_here(plan)
    check_same_base(name, plan.spec.recipe.base.fingerprint)
    check_fits(plan)
    check_free_disk(plan)
    check_library_writable()
    run = create_run(plan, name)
    try:
        process = _start(run, plan.spec)
    except BaseException:
        shutil.rmtree(run.path, ignore_errors=True)
        raise
    _await_lock(run, process)
    return run


def resume(run: RunFolder, max_seconds: float | None = None, *, force: bool = False) -> None:
    """Starts the worker of a lost, failed or stopped run again; it goes on from the newest good checkpoint.

    Args:
        run: one that ended because its time was over is resumed too, if it gets more.
        max_seconds: its training time from now on, that of the processes before included; None leaves it as it is.
        force: go on though a data file has changed or is gone, with the tokens of the file as it was.

    Raises:
        BadInput: the run has a worker, is finished, or has no readable plan; a data file is not the planned one, and
            that is not forced.
        UsageError: it has trained that long already.
    """
    from edgepeft.data.prepare import check_unchanged

    plan = run.read_plan()
    watch = RunWatch(run, plan.steps)
    state = watch.poll()[1]
    if state.alive:
        raise BadInput(f"run {run.id} is {state.status}", hint=f"Follow it with `edgepeft runs attach {run.id}`")
    if state.wants_time and max_seconds is None:
        raise BadInput(
            f"the training time of run {run.id} was over after step {state.step:,} of {state.steps:,}",
            hint=f"Give it more: edgepeft runs resume {run.id} --max-time "
            f"{_twice(plan.spec.upkeep.max_seconds or 0.0)}",
        )
    if state.status == "finished" and not state.wants_time:
        adapter = state.published or plan.adapter_name
        raise BadInput(f"run {run.id} is finished", hint=f"Its adapter is {adapter}; train again for a new version")
    check_unchanged(plan.spec.recipe.data, forced=force, hint=FORCE_HINT)
    check_free_disk(plan)
    if max_seconds is not None:
        _give_time(run, watch, max_seconds)
    clear_request(run)
    with disk_errors(run.rescued_file):
        run.rescued_file.unlink(missing_ok=True)
    _await_lock(run, _start(run, plan.spec, old_data=force))


def _give_time(run: RunFolder, watch: RunWatch, max_seconds: float) -> None:
    ending = watch.folded.ending
    steps = sum(done.seconds for done in watch.folded.history)
    trained = ending.train_seconds if isinstance(ending, Finished) else steps
    if max_seconds <= trained:
        raise UsageError(
            f"run {run.id} has trained for {format_seconds(trained)} already",
            where="--max-time",
            hint=f"Give the time of the whole run, such as {_twice(trained)}",
        )
    write_atomic(run.time_limit_file, msgspec.json.encode(float(max_seconds)))


def _twice(seconds: float) -> str:
    """A time of about twice that, as an option takes it."""
    return f"{max(1, math.ceil(2 * seconds / 60))}m"


def restart_smaller(run: RunFolder, ending: str) -> None:
    """Starts the worker again with the next smaller layout; see `edgepeft.runs.rescue`.

    Args:
        run: a run without a worker.
        ending: how the last one ended, as the worker's option `--smaller` spells it.

    Raises:
        EdgepeftError: the worker ended before it began.
    """
    before = read_launched(run.launched_file)
    old_data = before is not None and before.old_data
    _await_lock(run, _start(run, run.read_plan().spec, "--smaller", ending, old_data=old_data))


def exit_code_of(run: RunFolder) -> int | None:
    """The exit code of the run's latest worker, negative for a signal; None when another process started it.

    Raises:
        subprocess.TimeoutExpired: it has not ended.
    """
    launched = read_launched(run.launched_file)
    for child in _children:
        if launched is not None and child.pid == launched.pid:
            # Its lock is free, so it is ending; what it leaves may still need a moment.
            return child.wait(_REAP_SECONDS)
    return None


def stop(
    run: RunFolder, timeout_seconds: float = 600.0, *, waiting: Callable[[RunState], None] | None = None
) -> RunState:
    """Asks the worker to stop and save, waits, and ends it when it does not obey in time.

    Args:
        run: the run; one without a worker is left as it is.
        timeout_seconds: how long the worker may take to end its step and save.
        waiting: called with the state from time to time.

    Raises:
        DiskProblem: the request cannot be written.
    """
    if not read_state(run).alive:
        return read_state(run)
    request(run, "stop")
    deadline = time.monotonic() + timeout_seconds
    while (state := read_state(run)).alive and time.monotonic() < deadline:
        if waiting is not None:
            waiting(state)
        time.sleep(0.2)
    if state.alive:
        # Whoever follows the run must not take this end for a lack of memory.
        with disk_errors(run.rescued_file):
            run.rescued_file.touch()
        _terminate(run)
    return read_state(run)


def remove(run: RunFolder) -> None:
    """Deletes a run folder; the adapters that it published stay.

    Raises:
        BadInput: its worker lives.
        DiskProblem: the folder may not be deleted.
    """
    if is_locked(run) or read_state(run).alive:
        raise BadInput(f"run {run.id} is running", hint=f"Stop it first with `edgepeft runs stop {run.id}`")
    doomed = run.path.with_name(f".{run.id}.removed")
    with disk_errors(run.path):
        # After the rename no list shows a half-deleted run.
        shutil.rmtree(doomed, ignore_errors=True)
        run.path.rename(doomed)
        shutil.rmtree(doomed)


def check_runs_here(plan: TrainPlan) -> None:
    """Refuses a plan without data, for a model that is not here, or for a card of another machine.

    Raises:
        BadInput: the plan names no data, or a file that is gone; it was made from a model's profile.
        DeviceUnusable: its card is not here.
    """
    if not plan.spec.recipe.base.fingerprint:
        raise _only_described(plan.spec.recipe.base.model)
    data = plan.spec.recipe.data.path
    if plan.data is None or not data:
        raise BadInput(
            "the plan was made without data", where="plan", hint="Make it again with: edgepeft plan MODEL DATA"
        )
    if not Path(data).is_file():
        raise BadInput("there is no such file", where=data, hint="Make the plan again with the data where it is now")
    device = plan.spec.device
    if device == "cpu":
        return
    from edgepeft.hardware.nvml import read_gpus

    if device not in [card.uuid for card in read_gpus()]:
        raise DeviceUnusable(
            f"the plan is for {device}, which is not in this machine",
            where="--gpu",
            hint="Take the plan to that machine, or plan for this one: leave --gpu out, or use --gpu cpu",
        )


def _only_described(model: str) -> BadInput:
    """The error for a plan whose model nobody has brought here."""
    from edgepeft.models.described import described_model, how_to_get

    profile = described_model(model)
    bring = how_to_get(profile) if profile is not None else "Add the model with: edgepeft models add DIR"
    return BadInput(
        "the plan was made from a profile: the model itself is not on this disk, and edgepeft never downloads",
        where=model,
        hint=f"{bring} ; then plan with that name",
    )


def needed_disk_bytes(plan: TrainPlan) -> int:
    """What the checkpoints and the adapter take at the most: parameters and optimizer state, float32."""
    step = next((phase for phase in plan.memory.phases if phase.name == "train step"), plan.memory.peak)
    adapter_bytes = step.bytes_by_category.get("adapter weights", 0)
    checkpoint_bytes = adapter_bytes + step.bytes_by_category.get("optimizer state", 0)
    # While a checkpoint is written, the oldest of those that are kept is still there; two older ones may be kept to go
    # back to if the run diverges.
    upkeep = plan.spec.upkeep
    checkpoints = upkeep.keep_checkpoints + 3 + (upkeep.keep == "best")
    copies = 2 if plan.spec.recipe.parent is None else 3
    return checkpoints * checkpoint_bytes + copies * adapter_bytes + _SPARE_DISK_BYTES


def check_free_disk(plan: TrainPlan) -> None:
    """Refuses a run whose checkpoints would fill the disk.

    Raises:
        DiskProblem: by how much it is short.
    """
    folder = home().runs
    while not folder.exists():
        folder = folder.parent
    free, needed = shutil.disk_usage(folder).free, needed_disk_bytes(plan)
    if free < needed:
        raise DiskProblem(
            f"{format_bytes(free)} are free, and the run needs up to {format_bytes(needed)}",
            where=str(folder),
            hint="Free some space, or set EDGEPEFT_HOME to another disk",
        )


def check_library_writable() -> None:
    """Refuses to train for hours what could not be kept afterwards.

    Raises:
        DiskProblem: the library's folder may not be written.
    """
    folder = home().adapters
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise DiskProblem(
            "no permission to write here: the adapter could not be kept",
            where=str(there),
            hint="Change the permissions, or set EDGEPEFT_HOME to a folder of yours",
        )


def log_tail(run: RunFolder, lines: int = 20) -> list[str]:
    """The last lines of worker.log."""
    try:
        with run.log_file.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - (1 << 14)))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]


def _start(run: RunFolder, spec: RunSpec, *options: str, old_data: bool = False) -> subprocess.Popen[bytes]:
    _children[:] = [child for child in _children if child.poll() is None]
    previous = read_launched(run.launched_file)
    launched = Launched(time=time.time(), events_bytes=events_bytes(run), old_data=old_data)
    _write_launched(run, launched)
    try:
        with disk_errors(run.log_file), run.log_file.open("ab") as log:
            process = start_worker(
                WORKER,
                [str(run.path), *(["--old-data"] if old_data else []), *options],
                device=spec.device,
                deterministic=spec.layout.deterministic,
                detached=True,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=run.path,
            )
    except BaseException:
        _restore_launched(run, previous)
        raise
    _children.append(process)
    _write_launched(run, msgspec.structs.replace(launched, pid=process.pid))
    return process


def _await_lock(run: RunFolder, process: subprocess.Popen[bytes]) -> None:
    """Returns once the worker holds the lock, or has spoken; raises what it died of before that."""
    launched = read_launched(run.launched_file) or Launched(time.time(), events_bytes(run), process.pid)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        code = process.poll()
        if is_locked(run):
            _write_launched(run, msgspec.structs.replace(launched, took_lock=True))
            return
        if code is not None:
            _write_launched(run, msgspec.structs.replace(launched, took_lock=True))
            if events_bytes(run) > (launched.events_bytes or 0):
                return
            said = log_tail(run, 1)
            raise error_for_code(
                code,
                f"the worker of run {run.id} ended before it began" + (f": {said[-1]}" if said else ""),
                hint=f"Its log is {run.log_file}",
            )
        time.sleep(_POLL_SECONDS)


def _write_launched(run: RunFolder, launched: Launched) -> None:
    write_atomic(run.launched_file, msgspec.json.encode(launched))


def _restore_launched(run: RunFolder, previous: Launched | None) -> None:
    if previous is None:
        run.launched_file.unlink(missing_ok=True)
    else:
        _write_launched(run, previous)


def _terminate(run: RunFolder) -> None:
    """Ends the worker of `run` by its process id, after checking that the id still belongs to it."""
    import psutil

    process = _worker_process(run)
    if process is None:
        raise BadInput(
            f"the worker of run {run.id} does not stop, and its process is not known",
            hint=f"Look for a process with {run.path} in its command line",
        )
    family: list[Any] = [process, *process.children(recursive=True)]
    for member in family:
        try:
            member.terminate()
        except psutil.NoSuchProcess:
            continue
    _, stubborn = psutil.wait_procs(family, timeout=_TERMINATE_SECONDS)
    for member in stubborn:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(stubborn, timeout=_TERMINATE_SECONDS)
    for child in _children:
        child.poll()


def _worker_process(run: RunFolder) -> Any:
    """The psutil process of the worker; None when the recorded id is unknown or belongs to another program."""
    import psutil

    launched = read_launched(run.launched_file)
    if launched is None or launched.pid is None:
        return None
    try:
        process = psutil.Process(launched.pid)
        command = process.cmdline()
    except psutil.Error:
        return None
    return process if str(run.path) in command else None
