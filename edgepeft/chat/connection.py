"""One inference process and the pipes to it: what both clients stand on."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import IO

import msgspec

from edgepeft.chat.protocol import Cancel, Reply, Request, Trouble
from edgepeft.errors import EdgepeftError, OutOfMemory, error_for_code
from edgepeft.paths import disk_errors, home, make_folder
from edgepeft.processes import start_worker

_KEPT_LOGS = 10
_PATIENCE_SECONDS = 5.0


class Connection:
    """Starts the process; a thread reads its replies and hands each to `on_reply`, and None after the last one.

    The process ends by itself when its stdin closes, so it cannot outlive its front end.
    """

    def __init__(self, arguments: list[str], device: str, on_reply: Callable[[Reply | None], None]) -> None:
        self.log_file = _new_log()
        with disk_errors(self.log_file), self.log_file.open("wb") as log:
            self._process = start_worker(
                "infer",
                arguments,
                device=device,
                # Ctrl-C at the terminal stops an answer, not the process that gives it.
                detached=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin: IO[bytes] = self._process.stdin
        self._stdout: IO[bytes] = self._process.stdout
        self._writing = threading.Lock()
        self._on_reply = on_reply
        self._reader = threading.Thread(target=self._read, daemon=True, name="replies")
        self._reader.start()

    def send(self, request: Request) -> None:
        """Writes one request.

        Raises:
            EdgepeftError: the process is gone.
        """
        line = msgspec.json.encode(request) + b"\n"
        with self._writing:
            try:
                self._stdin.write(line)
                self._stdin.flush()
            except (OSError, ValueError) as error:
                raise self.death() from error

    def cancel(self, request_id: int) -> None:
        """Asks to stop a request; nothing happens when it has ended already."""
        try:
            self.send(Cancel(id=request_id))
        except EdgepeftError:
            # A process that is gone has stopped.
            return

    def death(self) -> EdgepeftError:
        """Why the process ended, from its exit code and the last line of its log."""
        try:
            code = self._process.wait(timeout=_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if code in (-9, 137):
            return OutOfMemory(
                "the system ended the inference process, most likely because memory ran out",
                where="inference",
                hint=f"Use a smaller model or --precision nf4; its log is {self.log_file}",
            )
        return EdgepeftError(
            f"the inference process ended unexpectedly (code {code}): {_last_line(self.log_file)}",
            where="inference",
            hint=f"Its log is {self.log_file}",
        )

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Ends the process at once, as while it loads and listens to nobody."""
        self._process.kill()
        self.close()

    def close(self) -> None:
        """Ends the process; waits a few seconds for it to go by itself."""
        # Closing flushes, which fails when the process is gone already.
        with self._writing, contextlib.suppress(OSError):
            self._stdin.close()
        try:
            self._process.wait(timeout=_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(timeout=_PATIENCE_SECONDS)
        self._stdout.close()
        if self._process.returncode == 0 and self.log_file.is_file() and self.log_file.stat().st_size == 0:
            self.log_file.unlink(missing_ok=True)

    def _read(self) -> None:
        decoder = msgspec.json.Decoder(Reply)
        for line in self._stdout:
            try:
                reply = decoder.decode(line)
            except msgspec.DecodeError:
                # Half a line of a process that was killed while it wrote.
                continue
            self._on_reply(reply)
        self._on_reply(None)


def worker_arguments(
    model: str, precision: str, compute_dtype: str, device: str, budget_bytes: int | None
) -> list[str]:
    """The options of `python -m edgepeft.engine.workers.infer`."""
    arguments = ["--model", model, "--precision", precision, "--compute", compute_dtype, "--device", device]
    return arguments if budget_bytes is None else [*arguments, "--budget", str(budget_bytes)]


def as_error(trouble: Trouble) -> EdgepeftError:
    """The error that a `Trouble` tells about."""
    return error_for_code(trouble.exit_code, trouble.message.rstrip("."))


def _new_log() -> Path:
    folder = home().cache / "logs"
    make_folder(folder)
    with disk_errors(folder):
        for old in sorted(folder.glob("infer-*.log"))[: -_KEPT_LOGS + 1]:
            try:
                old.unlink()
            except OSError:
                # Windows does not delete the log of a process that still runs.
                continue
    return folder / f"infer-{datetime.now():%Y%m%d-%H%M%S-%f}.log"


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it wrote nothing to its log"
