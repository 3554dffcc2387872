"""Interrupting and doubling the conversion of a model, with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgepeft.errors import ExitCode
from edgepeft.models.embedded import EMBEDDED
from edgepeft.models.store import find_model, verify_unchanged
from edgepeft.paths import home

COMMAND = [sys.executable, "-m", "edgepeft", "models", "add", EMBEDDED]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_an_interrupted_conversion_leaves_nothing() -> None:
    process = subprocess.Popen(COMMAND, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    half: Path = home().models / f".{EMBEDDED}.partial" / "model.safetensors"
    deadline = time.monotonic() + 120
    while not half.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert half.exists()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == ExitCode.INTERRUPTED
    assert [path.name for path in home().models.iterdir() if path.suffix != ".lock"] == []


@pytest.mark.slow
def test_two_processes_convert_once() -> None:
    processes = [subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    outcomes = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outcomes
    # Only the process that converted says that it does.
    assert sum(b"Converting to bf16" in error for _, error in outcomes) == 1
    verify_unchanged(find_model(EMBEDDED))
