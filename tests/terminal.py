"""The real program in a pseudo-terminal: its keys pressed, what it writes read, and ended in every rude way."""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time

KEYS = {"f2": b"\x1bOQ", "f3": b"\x1bOR", "f4": b"\x1bOS", "space": b" ", "enter": b"\r", "ctrl+q": b"\x11"}
_ESCAPES = re.compile(rb"\x1b\[[0-9;?<>=]*[a-zA-Z]|\x1b\][^\x07\x1b]*(\x07|\x1b\\)|\x1b[=>]")


def _hears_hang_up() -> None:
    # As in a terminal's shell, also where the tests themselves run under nohup.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Terminal:
    """`edgepeft` on a terminal of its own, in a process group of its own; POSIX only."""

    def __init__(self, columns: int = 120, lines: int = 40, *, ignores_hang_up: bool = False) -> None:
        import fcntl
        import pty
        import termios

        self._leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "edgepeft"],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            start_new_session=True,
            preexec_fn=(lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) if ignores_hang_up else _hears_hang_up,
            env={**os.environ, "TERM": "xterm-256color"},
        )
        os.close(follower)
        self._seen = b""
        self._reader = threading.Thread(target=self._drain, daemon=True)
        self._reader.start()

    def _drain(self) -> None:
        while True:
            try:
                read = os.read(self._leader, 65536)
            except OSError:
                return
            if not read:
                return
            self._seen += read

    @property
    def text(self) -> str:
        """All that was written so far, in the order of writing, without colours and cursor moves."""
        return _ESCAPES.sub(b"", self._seen).decode("utf-8", errors="replace")

    def until(self, pattern: str, seconds: float = 60.0) -> None:
        """Waits until something was written that `pattern` matches."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.text):
            assert self.process.poll() is None, self.text[-2000:]
            assert time.monotonic() < deadline, f"{pattern} was not seen in\n{self.text[-4000:]}"
            time.sleep(0.05)

    def forget(self) -> None:
        """What was written until now does not count any more."""
        self._seen = b""

    def press(self, *keys: str) -> None:
        """Sends keys, a moment apart."""
        for key in keys:
            os.write(self._leader, KEYS.get(key, key.encode()))
            time.sleep(0.1)

    def kill(self) -> None:
        """Ends the program by SIGKILL, together with whatever is still in its process group."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def hang_up(self) -> int:
        """Closes the terminal, as closing its window does, and returns how the program ended."""
        os.kill(self.process.pid, signal.SIGHUP)
        os.close(self._leader)
        return self.process.wait(30)
