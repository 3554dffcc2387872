"""Dry runs for plans: the engine's training step on tensors without values, in a child process, answers cached.

A step is simulated by the engine, which imports torch; the light side sends requests as JSON lines and keeps every
answer by the content of its question.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import IO

import msgspec

import edgepeft
from edgepeft.errors import DeviceUnusable, EdgepeftError, ExitCode, Interrupted, error_for_code
from edgepeft.memory.dry_run import DryRun, DryRunFailed, DryRunRequest
from edgepeft.paths import home, write_atomic
from edgepeft.processes import start_worker

Say = Callable[[str], None]
"""Told what is being done."""
_PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate")
"""Whose operations a dry run follows."""
_END_SECONDS = 5.0


class CannotSimulateError(EdgepeftError):
    """A step that a dry run cannot follow; it may well run."""


class Simulator:
    """A client of the worker that simulates: started at the first question that was never asked, ended by `close`.

    Args:
        say: told when the worker is asked.
    """

    def __init__(self, say: Say = lambda what: None) -> None:
        self._say = say
        self._worker: subprocess.Popen[bytes] | None = None
        self._complaints: IO[bytes] | None = None
        self._cancelled = False

    def __enter__(self) -> Simulator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def dry_run(self, request: DryRunRequest) -> DryRun:
        """What the step would hold.

        Raises:
            CannotSimulateError: it does something that needs values.
            EdgepeftError: it could not be trained either.
            DeviceUnusable: the worker ended.
            Interrupted: it was cancelled.
            DiskProblem: the answer cannot be kept.
        """
        path = answer_file(request)
        known = _read(path)
        if known is not None:
            return known
        if self._cancelled:
            raise Interrupted("the dry run was cancelled")
        self._say("simulating the training step")
        answer = self._ask(request)
        write_atomic(path, msgspec.json.encode(answer))
        return answer

    def cancel(self) -> None:
        """Ends what another thread waits for: its `dry_run` raises `Interrupted`, now or when it next asks."""
        self._cancelled = True
        worker = self._worker
        if worker is not None:
            worker.kill()

    def close(self) -> None:
        """Ends the worker."""
        worker, self._worker = self._worker, None
        if worker is not None:
            if worker.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    worker.stdin.close()
            try:
                worker.wait(timeout=_END_SECONDS)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
            if worker.stdout is not None:
                worker.stdout.close()
        if self._complaints is not None:
            self._complaints.close()
            self._complaints = None

    def _ask(self, request: DryRunRequest) -> DryRun:
        worker = self._running()
        if self._cancelled:
            # It was asked for while the worker started.
            worker.kill()
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            worker.stdin.write(msgspec.json.encode(request) + b"\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
        except BrokenPipeError:
            line = b""
        except BaseException:
            # An answer that nobody waited for would be taken for that of the next question.
            worker.kill()
            self.close()
            raise
        if not line.endswith(b"\n"):
            ended = self._ended()
            raise Interrupted("the dry run was cancelled") if self._cancelled else ended
        fields = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
        if "code" in fields:
            failed = msgspec.json.decode(line, type=DryRunFailed)
            if failed.code == ExitCode.BUG:
                raise CannotSimulateError(failed.what, where=failed.where, hint=failed.hint)
            raise error_for_code(failed.code, failed.what, where=failed.where, hint=failed.hint)
        return msgspec.json.decode(line, type=DryRun)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._worker is None or self._worker.poll() is not None:
            self.close()
            # A file, not a pipe: whatever libraries print there, nobody has to read it along.
            self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
            self._worker = start_worker(
                "simulate", [], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._complaints
            )
        return self._worker

    def _ended(self) -> DeviceUnusable:
        said = ""
        if self._complaints is not None:
            self._complaints.seek(0)
            said = self._complaints.read().decode(errors="replace").strip()
        code = self._worker.wait() if self._worker is not None else None
        self.close()
        last = said.splitlines()[-1] if said else f"the worker ended with exit code {code}"
        return DeviceUnusable(f"the dry run failed: {last}", hint="See the problems that edgepeft doctor lists")


def dry_run(request: DryRunRequest, say: Say = lambda what: None) -> DryRun:
    """One answer of a `Simulator`, from the cache where it is known.

    Raises:
        EdgepeftError: as `Simulator.dry_run`.
    """
    with Simulator(say) as simulator:
        return simulator.dry_run(request)


def answer_file(request: DryRunRequest) -> Path:
    """Where the answer to a request is kept: named by all that it depends on, and nothing else."""
    recipe, layout = request.spec.recipe, request.spec.layout
    question = (
        recipe.method,
        recipe.precision,
        recipe.compute_dtype,
        recipe.optimizer.name,
        layout.checkpointing,
        layout.loss_chunk_tokens,
        request.config,
        request.workload,
        request.target,
        request.full,
        _software(),
    )
    digest = hashlib.sha256(msgspec.json.encode(question, order="deterministic")).hexdigest()
    return home().cache / "dry_runs" / f"{digest[:40]}.json"


def _read(path: Path) -> DryRun | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=DryRun)
    except (OSError, msgspec.MsgspecError):
        # A cache: what cannot be read is simulated again.
        return None


@cache
def _software() -> tuple[str, ...]:
    """Versions of what is simulated; of our own files their sizes and times, since a checkout changes without one."""
    versions = []
    for package in _PACKAGES:
        try:
            versions.append(importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            versions.append("")
    root = Path(edgepeft.__file__).parent
    files = sorted(path for room in ("engine", "memory", "methods", "models") for path in (root / room).rglob("*.py"))
    stamps = [f"{path.relative_to(root)} {(found := path.stat()).st_size} {found.st_mtime_ns}" for path in files]
    return (edgepeft.__version__, *versions, hashlib.sha256("\n".join(stamps).encode()).hexdigest())
