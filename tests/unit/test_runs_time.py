"""Giving a run whose training time was over more of it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from edgepeft.errors import BadInput, UsageError
from edgepeft.runs import launch
from edgepeft.runs.events import EndedBy, Event, Finished, Started
from edgepeft.runs.events_file import EventWriter
from edgepeft.runs.layout import RunFolder, create_run
from toy_run import toy_plan, toy_step


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[RunFolder]:
    """The runs whose worker was started; none really is."""
    found: list[RunFolder] = []

    def start(run: RunFolder, *_: Any, **options: Any) -> None:
        found.append(run)

    monkeypatch.setattr(launch, "_start", start)
    monkeypatch.setattr(launch, "_await_lock", lambda run, process: None)
    return found


def ended_run(ended_by: EndedBy, *, stopped: bool = False) -> RunFolder:
    plan = toy_plan(9)
    upkeep = msgspec.structs.replace(plan.spec.upkeep, max_seconds=60.0)
    run = create_run(msgspec.structs.replace(plan, spec=msgspec.structs.replace(plan.spec, upkeep=upkeep)), "n")
    events: list[Event] = [Started(steps=9, device="cpu", versions={}), toy_step(4, seconds=61.0)]
    events.append(
        Finished(
            step=4,
            adapter="adapter",
            stopped=stopped,
            train_seconds=61.0,
            tokens_per_second=50.0,
            predicted_peak_bytes=100,
            measured_peak_bytes=90,
            ended_by=ended_by,
            published="" if stopped else "n@v1",
        )
    )
    with EventWriter(run.events_file) as writer:
        for event in events:
            writer.write(event)
    return run


def test_without_more_time_it_stays_finished(started: list[RunFolder]) -> None:
    run = ended_run("time")
    with pytest.raises(BadInput, match=r"over after step 4 of 9.*--max-time 2m"):
        launch.resume(run)
    with pytest.raises(UsageError, match=r"--max-time: run n-1 has trained for 1 min 01 s already.*such as 3m"):
        launch.resume(run, 61.0)
    assert not started
    assert run.read_plan().spec.upkeep.max_seconds == 60.0


def test_with_more_it_goes_on_and_the_plan_file_stays(started: list[RunFolder]) -> None:
    run = ended_run("time")
    before = run.plan_file.read_bytes()
    launch.resume(run, 120.0)
    assert started == [run]
    assert run.read_plan().spec.upkeep.max_seconds == 120.0
    assert run.plan_file.read_bytes() == before


@pytest.mark.parametrize("ended_by", ["steps", "early stop"])
def test_any_other_finished_run_is_refused(started: list[RunFolder], ended_by: EndedBy) -> None:
    with pytest.raises(BadInput, match="is finished"):
        launch.resume(ended_run(ended_by), 3600.0)
    assert not started


def test_a_stopped_run_may_be_given_another_time(started: list[RunFolder]) -> None:
    run = ended_run("request", stopped=True)
    launch.resume(run)
    assert run.read_plan().spec.upkeep.max_seconds == 60.0
    launch.resume(run, 7200.0)
    assert run.read_plan().spec.upkeep.max_seconds == 7200.0
    assert started == [run, run]


def test_a_damaged_limit_is_told(started: list[RunFolder]) -> None:
    run = ended_run("time")
    run.time_limit_file.write_text("two hours")
    with pytest.raises(BadInput, match="damaged"):
        run.read_plan()
