"""The run folder: what lies in it, how it comes into being, and how it is found again."""

from __future__ import annotations

import difflib
import errno
import os
import shutil
import tempfile
from pathlib import Path

import msgspec

from edgepeft.errors import BadInput
from edgepeft.library.parent import verified_folder
from edgepeft.library.store import copy_adapter
from edgepeft.paths import check_name, disk_errors, home, make_folder, sync_folder, write_atomic
from edgepeft.plan.train_plan import TrainPlan
from edgepeft.runs.control import CONTROL_FILE
from edgepeft.runs.lock import LOCK_FILE

_TAKEN_ERRNOS = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EACCES)


class RunFolder(msgspec.Struct, frozen=True):
    """One run on disk."""

    path: Path
    """The folder; its name is the run's id."""

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def id(self) -> str:
        """`NAME-K`, such as db-triage-1."""
        return self.path.name

    @property
    def plan_file(self) -> Path:
        """What is executed; never changed."""
        return self.path / "plan.json"

    @property
    def lock_file(self) -> Path:
        """Held by the worker for its whole life."""
        return self.path / LOCK_FILE

    @property
    def launched_file(self) -> Path:
        """When a worker was last started, until it speaks for itself."""
        return self.path / "launched.json"

    @property
    def rescued_file(self) -> Path:
        """Exists when a worker that was killed has been started again without being asked; once is enough."""
        return self.path / "rescued"

    @property
    def events_file(self) -> Path:
        """What the worker said, one event a line."""
        return self.path / "events.jsonl"

    @property
    def log_file(self) -> Path:
        """The worker's stdout and stderr."""
        return self.path / "worker.log"

    @property
    def control_file(self) -> Path:
        """What was asked of the worker."""
        return self.path / CONTROL_FILE

    @property
    def start(self) -> Path:
        """The adapter that training starts from, copied here at launch; absent where it starts from the base."""
        return self.path / "start"

    @property
    def checkpoints(self) -> Path:
        """Where the worker keeps what it resumes from."""
        return self.path / "checkpoints"

    @property
    def time_limit_file(self) -> Path:
        """The training time in seconds that `resume` gave the run, in place of the plan's."""
        return self.path / "max-seconds"

    @property
    def adapter(self) -> Path:
        """The finished adapter, until it is published."""
        return self.path / "adapter"

    def read_plan(self) -> TrainPlan:
        """The plan that this run executes, with the time that it was given since.

        Raises:
            BadInput: plan.json is missing, half-written or of another version.
        """
        try:
            with disk_errors(self.plan_file):
                plan = msgspec.json.decode(self.plan_file.read_bytes(), type=TrainPlan)
            return plan if (seconds := self._time_limit()) is None else _with_time(plan, seconds)
        except FileNotFoundError as error:
            raise BadInput(
                f"run {self.id} has no plan.json",
                where=str(self.path),
                hint=f"Remove it with `edgepeft runs remove {self.id}`",
            ) from error
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise BadInput(
                f"the plan of run {self.id} is damaged: {error}",
                where=str(self.plan_file),
                hint=f"Remove the run with `edgepeft runs remove {self.id}`",
            ) from error

    def _time_limit(self) -> float | None:
        try:
            return msgspec.json.decode(self.time_limit_file.read_bytes(), type=float)
        except FileNotFoundError:
            return None


def _with_time(plan: TrainPlan, max_seconds: float) -> TrainPlan:
    upkeep = msgspec.structs.replace(plan.spec.upkeep, max_seconds=max_seconds)
    return msgspec.structs.replace(plan, spec=msgspec.structs.replace(plan.spec, upkeep=upkeep))


def create_run(plan: TrainPlan, name: str) -> RunFolder:
    """Makes runs/NAME-K with its plan.json, K being one above the highest there is.

    The folder appears complete, under a number that no other launcher gets. An adapter that training starts from is
    copied into it: what the library holds later does not matter to the run.

    Raises:
        BadInput: the adapter to start from is gone, or changed since the plan was made.
        UsageError: `name` cannot be used as a name.
        DiskProblem: the disk is full, or may not be written.
    """
    check_name(name)
    ref = plan.spec.recipe.parent
    parent = None if ref is None else verified_folder(ref)
    runs = home().runs
    make_folder(runs)
    with disk_errors(runs):
        draft = Path(tempfile.mkdtemp(dir=runs, prefix=f".{name}."))
    try:
        content = msgspec.json.encode(msgspec.structs.replace(plan, adapter_name=name))
        write_atomic(draft / "plan.json", msgspec.json.format(content))
        if parent is not None:
            copy_adapter(parent, draft / "start")
        draft.chmod(0o755)
        number = _highest_number(runs, name)
        while True:
            number += 1
            target = runs / f"{name}-{number}"
            try:
                with disk_errors(runs):
                    _claim(draft, target)
            except FileExistsError:
                continue
            sync_folder(runs)
            return RunFolder(target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _claim(draft: Path, target: Path) -> None:
    """Renames `draft` to `target`; FileExistsError when there is one already. A run folder is never empty."""
    try:
        draft.rename(target)
    except OSError as error:
        if error.errno in _TAKEN_ERRNOS and target.exists():
            raise FileExistsError(error.errno, "taken", str(target)) from error
        raise


def _highest_number(runs: Path, name: str) -> int:
    numbers = [0]
    for entry in os.scandir(runs):
        stem, _, number = entry.name.rpartition("-")
        if stem == name and number.isdecimal():
            numbers.append(int(number))
    return max(numbers)


def list_runs() -> list[RunFolder]:
    """Every run folder, the newest first; damaged ones are among them."""
    runs = home().runs
    if not runs.is_dir():
        return []
    with disk_errors(runs):
        found = [(_made(Path(entry.path)), entry.name) for entry in os.scandir(runs) if _is_run(entry)]
    return [RunFolder(runs / name) for _, name in sorted(found, reverse=True)]


def _is_run(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def _made(folder: Path) -> float:
    for path in (folder / "plan.json", folder):
        try:
            return path.stat().st_mtime
        except FileNotFoundError:
            continue
    return 0.0


def open_run(reference: str) -> RunFolder:
    """The run of this id, or of this folder.

    Raises:
        BadInput: there is none; ids near it are named.
    """
    if os.sep in reference or (os.altsep and os.altsep in reference):
        path = Path(reference).expanduser().absolute()
        if (path / "plan.json").is_file():
            return RunFolder(path)
        raise BadInput("this folder holds no run", where=reference, hint="A run folder has a plan.json")
    path = home().runs / reference
    if reference and not reference.startswith(".") and path.is_dir():
        return RunFolder(path)
    known = [run.id for run in list_runs()]
    near = [run for run in known if run.rpartition("-")[0] == reference][:5]
    near = near or difflib.get_close_matches(reference, known, n=5, cutoff=0.5)
    if near:
        hint = "Did you mean " + " or ".join(near)
    elif known:
        hint = "See `edgepeft runs list`"
    else:
        hint = "There are no runs yet; start one with `edgepeft train`"
    raise BadInput(f"there is no run {reference!r}", hint=hint)
