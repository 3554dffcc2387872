"""The lock: one holder, freed by death, undisturbed by looks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from edgepeft.errors import BadInput
from edgepeft.runs.lock import RunLock, is_locked

HOLD = """
import subprocess, sys, time
from edgepeft.runs.lock import RunLock
lock = RunLock(sys.argv[1])
lock.acquire()
if sys.argv[2:] == ["child"]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
    print(child.pid, flush=True)
else:
    print("held", flush=True)
time.sleep(60)
"""


def _holder(folder: Path, *arguments: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_held_and_given_back(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    with RunLock(tmp_path) as lock:
        assert lock.held
        assert is_locked(tmp_path)
        with pytest.raises(BadInput, match="already has a worker"):
            RunLock(tmp_path, patience_seconds=0.02).acquire()
        assert is_locked(tmp_path)
    assert not lock.held
    assert not is_locked(tmp_path)
    lock.release()


def test_kill_frees_it(tmp_path: Path) -> None:
    process, _ = _holder(tmp_path)
    assert is_locked(tmp_path)
    process.kill()
    process.wait()
    assert not is_locked(tmp_path)
    with RunLock(tmp_path):
        assert is_locked(tmp_path)


def test_a_child_of_the_holder_does_not_inherit_it(tmp_path: Path) -> None:
    process, child = _holder(tmp_path, "child")
    process.kill()
    process.wait()
    assert not is_locked(tmp_path)
    os.kill(int(child), signal.SIGTERM)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_keep_it(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    child.start()
    try:
        assert is_locked(tmp_path)
        # Closing without unlocking is what the death of the parent does.
        os.close(lock._descriptor)
        lock._descriptor = None
        deadline = time.monotonic() + 10
        while is_locked(tmp_path):
            assert time.monotonic() < deadline, "the child keeps the lock"
            time.sleep(0.01)
    finally:
        child.terminate()
        child.join()


def test_looks_neither_keep_a_holder_out_nor_see_each_other(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        pass
    done = threading.Event()
    false_alarms: list[bool] = []

    def look_on() -> None:
        while not done.is_set():
            false_alarms.append(is_locked(tmp_path))

    watchers = [threading.Thread(target=look_on) for _ in range(4)]
    for watcher in watchers:
        watcher.start()
    time.sleep(0.2)
    done.set()
    for watcher in watchers:
        watcher.join()
    assert len(false_alarms) > 100
    assert not any(false_alarms)

    done.clear()
    watchers = [threading.Thread(target=look_on) for _ in range(4)]
    for watcher in watchers:
        watcher.start()
    for _ in range(20):
        with RunLock(tmp_path):
            assert is_locked(tmp_path)
    done.set()
    for watcher in watchers:
        watcher.join()
