"""Folders that may not be written: each command says so in one line, with the exit code of the disk."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgepeft.cli.app import app
from edgepeft.engine.workers.train import main as work
from edgepeft.errors import BadInput, DiskProblem, ExitCode
from edgepeft.library.store import resolve_adapter
from edgepeft.paths import home
from edgepeft.runs import launch as launching
from edgepeft.runs.events import Failed, Finished
from edgepeft.runs.events_file import EventWriter, read_events
from edgepeft.runs.launch import launch, resume
from edgepeft.runs.layout import RunFolder, create_run
from edgepeft.runs.lock import RunLock
from edgepeft.runs.state import read_state
from read_only import make_read_only
from toy_run import start_toy_worker, toy_plan
from training_runs import of_type, tiny_base, tiny_run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="file systems as Unix has them")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A failed toy run."""
    monkeypatch.setattr(launching, "start_worker", start_toy_worker)
    run = create_run(toy_plan(), "toy")
    with EventWriter(run.events_file) as events:
        events.write(Failed(message="m", exit_code=5))
    return run


def test_nothing_starts_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch, toy: RunFolder) -> None:
    make_read_only(monkeypatch, home().runs)
    for action in (lambda: launch(toy_plan(), "new"), lambda: resume(toy)):
        with pytest.raises(DiskProblem, match="no permission to write here") as problem:
            action()
        assert problem.value.exit_code == ExitCode.DISK
        assert str(home().runs) in problem.value.where
        assert "\n" not in str(problem.value)
    # Looking needs no permission.
    assert read_state(toy).status == "failed"
    for command in (["list"], ["show", toy.id]):
        shown = CliRunner().invoke(app, ["runs", *command])
        assert (shown.exit_code, "failed" in shown.output) == (0, True)


def test_a_library_that_cannot_be_written_is_found_before_training(
    monkeypatch: pytest.MonkeyPatch, toy: RunFolder
) -> None:
    home().adapters.mkdir(parents=True)
    make_read_only(monkeypatch, home().adapters)
    with pytest.raises(DiskProblem, match="the adapter could not be kept") as problem:
        launch(toy_plan(), "new")
    assert problem.value.where == str(home().adapters)
    assert not (home().runs / "new-1").exists()


def test_a_worker_in_a_read_only_folder_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(tmp_path, tiny_base(tmp_path))
    make_read_only(monkeypatch, run.path)
    assert work([str(run.path)]) == ExitCode.DISK
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "no permission to write here" in told
    assert str(run.path) in told


@pytest.mark.parametrize("where", ["checkpoints", "adapters"])
def test_what_becomes_read_only_on_the_way_costs_no_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    base = tiny_base(tmp_path)
    whole, run = tiny_run(tmp_path, base, "whole"), tiny_run(tmp_path, base, "run")
    assert work([str(whole.path)]) == 0
    with monkeypatch.context() as patched:
        make_read_only(patched, run.checkpoints if where == "checkpoints" else home().adapters)
        assert work([str(run.path)]) == ExitCode.DISK
    (failed,) = of_type(read_events(run.events_file), Failed)
    assert failed.exit_code == ExitCode.DISK
    assert "no permission to write here" in failed.message
    assert not failed.traceback
    assert read_state(run).resumable
    assert work([str(run.path)]) == 0
    (finished,) = of_type(read_events(run.events_file), Finished)
    assert finished.published == "run@v1"
    assert resolve_adapter("run").weights.read_bytes() == resolve_adapter("whole").weights.read_bytes()


def test_a_run_that_has_a_worker_is_not_resumed(toy: RunFolder) -> None:
    with RunLock(toy), EventWriter(toy.events_file):
        # The lock is held, and the last worker's end is told: whoever holds it is about to speak.
        toy.events_file.unlink()
        with pytest.raises(BadInput, match="run toy-1 is starting") as problem:
            resume(toy)
        assert problem.value.exit_code == ExitCode.BAD_INPUT
        assert "runs attach toy-1" in problem.value.hint
        refused = CliRunner().invoke(app, ["runs", "remove", toy.id, "--yes"])
        assert isinstance(refused.exception, BadInput)
    assert toy.path.is_dir()
