"""A newcomer's first hour, in the real terminal program and with keys alone: plan, train, watch, chat, swap, leave."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")]
ANSWER = "blue heron"


class Tmux:
    """`edgepeft` in a tmux session of a server of its own."""

    def __init__(self, folder: Path, columns: int = 110, lines: int = 36) -> None:
        self._name = f"edgepeft-{uuid.uuid4().hex[:8]}"
        self._run("-f", os.devnull, "new-session", "-d", "-x", str(columns), "-y", str(lines), "-c", str(folder))
        self._run("send-keys", f"exec {sys.executable} -m edgepeft", "Enter")

    def _run(self, *words: str) -> str:
        done = subprocess.run(["tmux", "-L", self._name, *words], capture_output=True, text=True, check=False)
        return done.stdout

    def screen(self) -> str:
        """What a person sees."""
        return self._run("capture-pane", "-p")

    def press(self, *keys: str) -> None:
        """Keys by tmux's names, a moment apart."""
        for key in keys:
            self._run("send-keys", key)
            time.sleep(0.3)

    def type(self, text: str) -> None:
        """Text as it is typed."""
        self._run("send-keys", "-l", text)
        time.sleep(0.5)

    def until(self, pattern: str, seconds: float = 90.0) -> str:
        """Waits until the screen matches; returns it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            shown = self.screen()
            if re.search(pattern, shown):
                return shown
            time.sleep(0.3)
        raise AssertionError(f"{pattern!r} was not seen; at last:\n{self.screen()}")

    def gone(self, seconds: float = 30.0) -> bool:
        """Whether the program has ended, and its session with it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self._run("list-sessions"):
                return True
            time.sleep(0.3)
        return False

    def kill(self) -> None:
        """Ends the server and all in it."""
        self._run("kill-server")


@pytest.fixture
def tmux(tmp_path: Path) -> Iterator[Tmux]:
    session = Tmux(tmp_path)
    yield session
    session.kill()


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    """Questions with one answer, so that a few steps teach it."""
    file = tmp_path / "birds.jsonl"
    rows = [{"prompt": f"Which bird was seen at pond {number}?", "completion": ANSWER} for number in range(48)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_plan_train_watch_chat_swap_and_leave_with_keys_alone(tmux: Tmux, birds: Path) -> None:
    tmux.until("No run yet")
    # Home → Plan with the demo's model and values; then the data of one's own.
    tmux.press("d")
    tmux.until(r"predicted +[\d.]+ [GM]iB", 240)
    tmux.press("d")
    tmux.until("birds|escape")
    tmux.press("C-u")
    tmux.type(str(birds))
    tmux.press("Enter")
    tmux.until(r"(?s)birds\.jsonl.*48 samples.*predicted +[\d.]+ [GM]iB", 120)
    tmux.press("C-s")
    tmux.until("enter takes it")
    tmux.press("C-u")
    tmux.type("birds")
    tmux.press("Enter")
    # Train: steps are seen, then the end.
    tmux.until(r"birds-1")
    tmux.until(r"step +\d+ ?/ ?\d+", 180)
    tmux.until(r"finished", 300)
    # Chat with the new adapter, then with the base alone.
    tmux.press("t")
    tmux.until("Write a message")
    tmux.type("Which bird was seen at pond 7?")
    tmux.press("Enter")
    tmux.until(rf"(?i){ANSWER}", 180)
    tmux.press("C-l")
    tmux.until(r"adapter \[base\]")
    tmux.type("Which bird was seen at pond 8?")
    tmux.press("Enter")
    tmux.until(r"(?s)pond 8\?.*│ base +│\n│ \S", 180)
    tmux.press("C-q")
    assert tmux.gone(), tmux.screen()
