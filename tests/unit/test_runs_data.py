"""Resuming a run whose data files are not the planned ones any more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from edgepeft.cli.app import app
from edgepeft.data.prepare import check_unchanged, describe_data
from edgepeft.errors import BadInput
from edgepeft.runs import launch as launching
from edgepeft.runs.events import Failed
from edgepeft.runs.events_file import EventWriter
from edgepeft.runs.launch import restart_smaller, resume
from edgepeft.runs.layout import RunFolder, create_run
from edgepeft.runs.state import read_launched
from toy_run import start_toy_worker, toy_plan


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held-out.jsonl"
    train.write_text('{"text": "one"}\n')
    held_out.write_text('{"text": "two"}\n')
    return train, held_out


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments of each worker."""
    found: list[list[str]] = []

    def start(name: str, arguments: list[str], **options: Any) -> Any:
        found.append(arguments[1:])
        return start_toy_worker(name, arguments, **options)

    monkeypatch.setattr(launching, "start_worker", start)
    return found


@pytest.fixture
def run(files: tuple[Path, Path]) -> RunFolder:
    plan = toy_plan()
    data = describe_data(files[0], eval_path=files[1])
    recipe = msgspec.structs.replace(plan.spec.recipe, data=data)
    plan = msgspec.structs.replace(plan, spec=msgspec.structs.replace(plan.spec, recipe=recipe))
    run = create_run(plan, "r")
    with EventWriter(run.events_file) as events:
        events.write(Failed(message="m", exit_code=5))
    return run


@pytest.mark.parametrize(("which", "role"), [(0, "training"), (1, "held-out")])
@pytest.mark.parametrize(("fate", "said"), [("changed", "has changed since the plan was made"), ("gone", "is gone")])
def test_it_says_which_file_and_what_to_do(
    run: RunFolder, files: tuple[Path, Path], started: list[list[str]], which: int, role: str, fate: str, said: str
) -> None:
    if fate == "gone":
        files[which].unlink()
    else:
        files[which].write_text("another\n")
    with pytest.raises(BadInput) as problem:
        resume(run)
    assert problem.value.what == f"the {role} file {said}"
    assert problem.value.where == str(files[which])
    assert "--force" in problem.value.hint
    refused = CliRunner().invoke(app, ["runs", "resume", run.id])
    assert isinstance(refused.exception, BadInput)
    assert started == []
    data = run.read_plan().spec.recipe.data
    (told,) = check_unchanged(data, forced=True)
    assert told.startswith(f"the {role} file {files[which]} {said}: the run goes on with the tokens")


def test_forced_it_stays_so_for_a_worker_that_is_started_again(
    run: RunFolder, files: tuple[Path, Path], started: list[list[str]]
) -> None:
    files[0].unlink()
    done = CliRunner().invoke(app, ["runs", "resume", run.id, "--force"])
    assert done.exit_code == 0, done.output
    launched = read_launched(run.launched_file)
    assert launched is not None
    assert launched.old_data
    restart_smaller(run, "killed")
    assert started == [["--old-data"], ["--old-data", "--smaller", "killed"]]


def test_unchanged_files_need_no_force(run: RunFolder, started: list[list[str]]) -> None:
    assert check_unchanged(run.read_plan().spec.recipe.data) == []
    resume(run)
    restart_smaller(run, "device")
    assert started == [[], ["--smaller", "device"]]
