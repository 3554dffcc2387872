"""How the light side starts the engine: by a child process with an environment made for it, never by an import."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import msgspec

from edgepeft.errors import EdgepeftError, ExitCode, error_for_code

_WORKERS = "edgepeft.engine.workers"

ONEDNN_PRIMITIVES = 128
"""Compiled products that oneDNN keeps; each takes some hundred kilobytes, and its own limit is 1,024."""
OPENMP_SPINS = 1000
"""Turns that a thread waits for the next product before it sleeps; read by GNU's OpenMP, which torch's Linux wheels
bring. On two cores, training alone ran at 303 tokens/s with none, 508 with 1,000 and 537 with 50,000; two runs at once
at 590, 413 and 56 together. With 4,000, two runs had half of what they have with 1,000."""
GLIBC_TUNABLES = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0:glibc.malloc.hugetlb=1"
"""No lists of freed small blocks beside the heap, and pages of 2 MiB for it where the system has them."""


CUBLAS_WORKSPACE = ":4096:8"
"""Eight workspaces of 4 MiB: with a fixed set of them cuBLAS gives the same bits each time (its manual, section
*Results reproducibility*)."""


def worker_environment(device: str = "cpu", *, deterministic: bool = False) -> dict[str, str]:
    """The environment of an engine process: offline, quiet, one card, an allocator that does not fragment.

    Args:
        device: `cpu`, or the UUID of the one card that the process may see.
        deterministic: whether the card's libraries have to give the same bits each time.
    """
    environment = dict(os.environ)
    environment.update(
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        DO_NOT_TRACK="1",
        TRANSFORMERS_VERBOSITY="error",
        TOKENIZERS_PARALLELISM="false",
        CUDA_DEVICE_ORDER="PCI_BUS_ID",
        PYTHONUNBUFFERED="1",
        PYTHONUTF8="1",
    )
    # Threads that spin at the end of each parallel product make decoding tens of times slower as soon as another
    # process wants the cores: a training run beside a chat, or a busy desktop. Threads that never spin are woken by the
    # system for each product, which halves the speed of training. Some microseconds of it are the middle way.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("GOMP_SPINCOUNT", str(OPENMP_SPINS))
    # torch asks for aligned tensors, so glibc cuts a sliver off each block. A freed sliver that is kept for reuse, as
    # glibc does by default, keeps the tensor's own block from growing back to a size that the next like it fits in:
    # the heap of a training run then becomes half as large again as the tensors in it. Without those lists it stays
    # within some percent of them at the same processor time. Large blocks mapped one by one (M_MMAP_THRESHOLD) need
    # as little, but a quarter more time for fresh pages. Large pages are 1,000 faults a step instead of 10,000 and some
    # percent of its time. Other C libraries do not read the variable.
    environment.setdefault("GLIBC_TUNABLES", GLIBC_TUNABLES)
    # oneDNN compiles a product for every shape. Rows are filled up (memory.chunks), which leaves some hundreds. A layer
    # and its backward have 25 of them, and five for each length of a sample in the micro-batch, and all layers have
    # the same. So this many are found again as often as with no limit.
    environment.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(ONEDNN_PRIMITIVES))
    if deterministic and device != "cpu":
        environment["CUBLAS_WORKSPACE_CONFIG"] = CUBLAS_WORKSPACE
    environment["CUDA_VISIBLE_DEVICES"] = "" if device == "cpu" else device
    if os.name != "nt":
        environment.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    return environment


def worker_command(name: str, arguments: Sequence[str]) -> list[str]:
    """The command line of worker NAME."""
    return [sys.executable, "-m", f"{_WORKERS}.{name}", *arguments]


def start_worker(
    name: str,
    arguments: Sequence[str],
    *,
    device: str = "cpu",
    deterministic: bool = False,
    detached: bool = False,
    stdin: int | IO[Any] | None = subprocess.DEVNULL,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
    cwd: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Starts `python -m edgepeft.engine.workers.NAME ARGUMENTS…`.

    A detached worker has a session (on Windows a process group) of its own: neither Ctrl-C at the terminal nor the end
    of its parent reaches it.
    """
    options: dict[str, Any] = {}
    if detached and os.name == "nt":
        options["creationflags"] = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0) | getattr(
            subprocess, "CREATE_NO_WINDOW", 0
        )
    elif detached:
        options["start_new_session"] = True
    return subprocess.Popen(
        worker_command(name, arguments),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        cwd=cwd,
        env=worker_environment(device, deterministic=deterministic),
        close_fds=True,
        **options,
    )


Progress = Callable[[str, float | None], None]
"""Called with what is being done, and how much of it is done (0 to 1; None when that is not known)."""
Outcome = TypeVar("Outcome", bound=msgspec.Struct)


class WorkProgress(msgspec.Struct, frozen=True, tag="progress"):
    """How far a worker is."""

    phase: str
    """What it does now."""
    fraction: float | None = None
    """Share of it that is done; None when not known."""


class WorkFailed(msgspec.Struct, frozen=True, tag="failed"):
    """A worker gave up."""

    code: int
    """Its exit code."""
    what: str
    """What is wrong."""
    where: str = ""
    """File or tensor."""
    hint: str = ""
    """What to do next."""


class Task(msgspec.Struct, frozen=True):
    """One piece of work for a worker that ends with it."""

    worker: str
    """Module in edgepeft.engine.workers."""
    name: str
    """As a person calls it, such as `the conversion`."""
    where: str
    """What it works on, for messages."""
    arguments: tuple[str, ...] = ()
    """Of its command line."""
    question: bytes = b""
    """What it reads from stdin."""
    when_killed: str = "Close other programs and try again"
    """What helps where memory ran out."""


def run_task(task: Task, outcome: type[Outcome], progress: Progress | None = None) -> Outcome:
    """Runs a worker to its end and returns what it said there; it is killed when the caller is interrupted.

    Its stdout has lines of JSON: `WorkProgress`, then an outcome or `WorkFailed`.

    Args:
        task: what to do.
        outcome: what it says at its end; a tagged struct.
        progress: told how far it is.

    Raises:
        EdgepeftError: what the worker failed with, or that it died.
    """
    decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(WorkProgress | outcome | WorkFailed)
    said: list[Any] = []

    def hear(line: bytes) -> None:
        try:
            message = decoder.decode(line)
        except msgspec.DecodeError:
            return
        if not isinstance(message, WorkProgress):
            said.append(message)
        elif progress is not None:
            progress(message.phase, message.fraction)

    code, last_line = _listen(task, hear)
    last = said[-1] if said else None
    if isinstance(last, WorkFailed):
        raise error_for_code(last.code, last.what, where=last.where, hint=last.hint)
    if last is not None and code == 0:
        found: Outcome = last
        return found
    raise _died(task, code, last_line)


def _listen(task: Task, hear: Callable[[bytes], None]) -> tuple[int, str]:
    """Tells each line of a worker's stdout; returns its exit code, and the last line of its stderr."""
    # Files, not pipes: whatever is written there, nobody has to read it along.
    with tempfile.TemporaryFile() as complaints, tempfile.TemporaryFile() as questions:
        questions.write(task.question)
        questions.seek(0)
        worker = start_worker(task.worker, task.arguments, stdin=questions, stdout=subprocess.PIPE, stderr=complaints)
        try:
            assert worker.stdout is not None
            for line in worker.stdout:
                hear(line)
            code = worker.wait()
        finally:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
            if worker.stdout is not None:
                worker.stdout.close()
        complaints.seek(0)
        lines = [line for line in complaints.read().decode(errors="replace").splitlines() if line.strip()]
    return code, lines[-1] if lines else ""


def _died(task: Task, code: int, last_line: str) -> EdgepeftError:
    if code in (-9, 137):
        what = f"the system ended {task.name}, most likely because memory ran out"
        return error_for_code(ExitCode.OUT_OF_MEMORY, what, where=task.where, hint=task.when_killed)
    reason = f": {last_line}" if last_line else ""
    return error_for_code(ExitCode.BUG, f"{task.name} ended with code {code}{reason}", where=task.where)
