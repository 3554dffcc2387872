"""The training worker as a process: killed, terminated, locked out, given bad input."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from edgepeft.errors import ExitCode
from edgepeft.models.store import ModelEntry
from edgepeft.processes import start_worker
from edgepeft.runs.events import Failed, Finished, Started, StepDone
from edgepeft.runs.events_file import read_events
from edgepeft.runs.layout import RunFolder
from edgepeft.runs.lock import RunLock
from edgepeft.runs.state import read_state
from training_runs import of_type, tiny_base, tiny_run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals as Unix has them")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def base(tmp_path: Path) -> ModelEntry:
    return tiny_base(tmp_path)


def start(run: RunFolder) -> subprocess.Popen[bytes]:
    with run.log_file.open("ab") as log:
        return start_worker("train", [str(run.path)], stdout=log, stderr=subprocess.STDOUT)


def finish(run: RunFolder) -> int:
    return start(run).wait(240)


def wait_for_step(run: RunFolder, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if any(found.step >= step for found in of_type(read_events(run.events_file), StepDone)):
            return
        assert process.poll() is None, run.log_file.read_text()
        time.sleep(0.002)
    raise AssertionError("no such step in time")


@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical(tmp_path: Path, base: ModelEntry) -> None:
    options = {"max_steps": 40, "epochs": 20.0, "checkpoint_steps": 3}
    whole, killed = tiny_run(tmp_path, base, "whole", **options), tiny_run(tmp_path, base, "killed", **options)
    assert finish(whole) == 0, whole.log_file.read_text()
    process = start(killed)
    wait_for_step(killed, 5, process)
    process.kill()
    process.wait()
    assert read_state(killed).status == "lost"
    assert finish(killed) == 0, killed.log_file.read_text()
    events = read_events(killed.events_file)
    again = of_type(events, Started)[1].step
    assert again >= 3
    assert again % 3 == 0
    assert of_type(events, Finished)[0].published == "killed@v1"
    assert read_state(killed).status == "finished"
    expected = load_file(whole.adapter / "adapter_model.safetensors")
    for name, value in load_file(killed.adapter / "adapter_model.safetensors").items():
        assert value.tobytes() == expected[name].tobytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=str)
def test_a_signal_stops_cleanly_and_saves(tmp_path: Path, base: ModelEntry, number: signal.Signals) -> None:
    run = tiny_run(tmp_path, base, max_steps=4000, epochs=2000.0)
    process = start(run)
    wait_for_step(run, 2, process)
    process.send_signal(number)
    assert process.wait(60) == 0, run.log_file.read_text()
    (finished,) = of_type(read_events(run.events_file), Finished)
    assert finished.stopped
    assert (run.path / "checkpoints" / f"step-{finished.step}" / "state.json").is_file()
    assert (run.adapter / "adapter_model.safetensors").is_file()
    assert read_state(run).status == "stopped"


@pytest.mark.slow
def test_hung_up_and_terminated_it_ends_bit_identical(tmp_path: Path, base: ModelEntry) -> None:
    options = {"max_steps": 300, "epochs": 150.0}
    whole, parts = tiny_run(tmp_path, base, "whole", **options), tiny_run(tmp_path, base, "parts", **options)
    assert finish(whole) == 0, whole.log_file.read_text()
    step = 0
    for number in (signal.SIGHUP, signal.SIGTERM):
        process = start(parts)
        wait_for_step(parts, step + 3, process)
        process.send_signal(number)
        assert process.wait(60) == 0, parts.log_file.read_text()
        finished = of_type(read_events(parts.events_file), Finished)[-1]
        assert finished.stopped
        assert step + 3 <= finished.step < 300
        step = finished.step
        assert (parts.path / "checkpoints" / f"step-{step}" / "state.json").is_file()
        assert read_state(parts).status == "stopped"
    assert finish(parts) == 0, parts.log_file.read_text()
    assert of_type(read_events(parts.events_file), Started)[-1].step == step
    assert of_type(read_events(parts.events_file), Finished)[-1].published == "parts@v1"
    name = "adapter_model.safetensors"
    assert (parts.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()


def test_bad_input_is_told_in_the_events(tmp_path: Path, base: ModelEntry) -> None:
    run = tiny_run(tmp_path, base)
    (Path(base.weights) / "model.safetensors").unlink()
    assert finish(run) == ExitCode.BAD_INPUT
    (failed,) = of_type(read_events(run.events_file), Failed)
    assert failed.exit_code == ExitCode.BAD_INPUT
    assert "no longer there" in failed.message
    assert not failed.traceback
    assert not run.adapter.exists()


def test_a_second_worker_is_refused_and_disturbs_nothing(tmp_path: Path, base: ModelEntry) -> None:
    run = tiny_run(tmp_path, base)
    with RunLock(run):
        assert finish(run) == ExitCode.BAD_INPUT
        assert not run.events_file.exists()
    assert "already has a worker" in run.log_file.read_text()


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    process = start_worker("train", [str(tmp_path)], stderr=subprocess.PIPE)
    _, told = process.communicate(timeout=60)
    assert process.returncode == ExitCode.BAD_INPUT
    assert b"holds no run" in told
