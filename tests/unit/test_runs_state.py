"""Folding events and the lock into a state, over files as runs leave them behind."""

from __future__ import annotations

import re
import time
from pathlib import Path

import msgspec
import pytest
from rich.text import Text
from typer.testing import CliRunner

from edgepeft.cli import attach as attaching
from edgepeft.cli.app import app
from edgepeft.runs import state as state_module
from edgepeft.runs.events import CheckpointSaved, EndedBy, Evaluated, Event, Failed, Finished, PhaseChanged, Started
from edgepeft.runs.events_file import EventWriter, encode_event
from edgepeft.runs.layout import RunFolder, create_run
from edgepeft.runs.lock import RunLock
from edgepeft.runs.state import Launched, RunFold, RunState, RunWatch, fold, read_state, summarise_run, summarise_runs
from toy_run import toy_plan, toy_step


def at(moment: float, event: Event) -> Event:
    return msgspec.structs.replace(event, time=moment)


STARTED = Started(steps=9, device="cpu", versions={})
FINISHED = Finished(
    step=9,
    adapter="adapter",
    train_seconds=2.0,
    tokens_per_second=50.0,
    predicted_peak_bytes=100,
    measured_peak_bytes=90,
    published="n@v1",
)
FAILED = Failed(message="the disk is full", exit_code=7, step=2)


def test_a_worker_that_begins_between_two_looks_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    run = create_run(toy_plan(), "n")
    run.events_file.write_bytes(encode_event(at(1000.0, STARTED)))
    # The lock was looked at before the worker took it, and the events were read after it had spoken.
    looks = iter([False, True, False, True, True])
    monkeypatch.setattr(state_module, "is_locked", lambda run: next(looks))
    assert read_state(run).status == "running"
    assert summarise_run(run).state.status == "running"


def test_a_finished_run() -> None:
    events = [
        STARTED,
        toy_step(8),
        toy_step(9, 0.25),
        Evaluated(step=9, loss=0.3, samples=1, trained_tokens=5),
        FINISHED,
    ]
    state = fold(events, lock_held=False)
    assert (state.status, state.step, state.steps, state.loss, state.eval_loss) == ("finished", 9, 9, 0.25, 0.3)
    assert state.published == "n@v1"
    assert fold(events, lock_held=True).status == "finished"
    assert not state.alive
    assert not state.resumable


@pytest.mark.parametrize(
    ("last", "lock_held", "status"),
    [
        (toy_step(1), True, "running"),
        (toy_step(1), False, "lost"),
        (FAILED, False, "failed"),
        (msgspec.structs.replace(FINISHED, stopped=True), False, "stopped"),
        (PhaseChanged(name="save"), True, "running"),
    ],
)
def test_status_is_the_last_word_and_the_lock(last: Event, lock_held: bool, status: str) -> None:
    assert fold([STARTED, last], lock_held).status == status


def test_a_failed_run_says_why() -> None:
    state = fold([STARTED, toy_step(2), FAILED], lock_held=False)
    assert (state.message, state.exit_code, state.resumable) == ("the disk is full", 7, True)


def test_a_resume_voids_later_steps() -> None:
    folded = RunFold()
    before = [STARTED, *(toy_step(step, 10.0 + step) for step in range(1, 6))]
    late_eval = Evaluated(step=5, loss=9.0, samples=1, trained_tokens=1)
    for event in [
        *before,
        CheckpointSaved(step=3, path="c"),
        late_eval,
        Started(step=3, steps=9, device="cpu", versions={}),
    ]:
        folded.add(event)
    state = folded.state(lock_held=True)
    assert (state.step, state.loss, state.eval_loss, state.checkpoint_step) == (3, 13.0, None, 3)
    folded.add(toy_step(4, 1.0))
    assert [(done.step, done.loss) for done in folded.history] == [(1, 11.0), (2, 12.0), (3, 13.0), (4, 1.0)]


def test_a_resumed_failure_runs_again() -> None:
    assert (
        fold([STARTED, FAILED, Started(step=0, steps=9, device="cpu", versions={})], lock_held=True).status == "running"
    )


def test_the_first_seconds_are_not_lost() -> None:
    launched = Launched(time=1000.0, pid=1)
    assert fold([], False, launched=launched, now=1003.0).status == "starting"
    assert fold([], True, launched=launched, now=1003.0).status == "starting"
    assert fold([], False, launched=launched, now=2000.0).status == "lost"
    took = msgspec.structs.replace(launched, took_lock=True)
    assert fold([], False, launched=took, now=1003.0).status == "lost"
    assert fold([], False).status == "lost"


def test_a_resume_is_starting_until_its_worker_speaks() -> None:
    before = [at(1.0, STARTED), at(2.0, FAILED)]
    launched = Launched(time=1000.0, pid=1)
    assert fold(before, True, launched=launched, now=1001.0).status == "starting"
    assert fold(before, False, launched=launched, now=1001.0).status == "starting"
    assert fold([*before, at(1002.0, STARTED)], True, launched=launched, now=1003.0).status == "running"
    assert fold([*before, at(1002.0, STARTED)], False, launched=launched, now=1003.0).status == "lost"


def _write(run: RunFolder, events: list[Event], rest: bytes = b"") -> None:
    run.events_file.write_bytes(b"".join(map(encode_event, events)) + rest)


def test_a_run_killed_in_the_middle_of_a_line() -> None:
    run = create_run(toy_plan(), "killed")
    _write(run, [STARTED, toy_step(1)], b'{"type":"step","st')
    assert (read_state(run).status, read_state(run).step) == ("lost", 1)
    with RunLock(run):
        assert read_state(run).status == "running"


def test_unknown_types_do_not_disturb() -> None:
    run = create_run(toy_plan(), "future")
    lines = [encode_event(STARTED), b'{"type":"thought","time":5}\n', b"\x00garbage\n", encode_event(toy_step(3))]
    run.events_file.write_bytes(b"".join(lines))
    state = read_state(run)
    assert (state.step, state.skipped_lines) == (3, 1)


def test_watching_reads_only_what_is_new() -> None:
    run = create_run(toy_plan(), "watched")
    watch = RunWatch(run)
    assert watch.poll()[0] == []
    _write(run, [STARTED, toy_step(1)])
    assert len(watch.poll()[0]) == 2
    with run.events_file.open("ab") as file:
        file.write(encode_event(toy_step(2)))
    events, state = watch.poll()
    assert (len(events), state.step) == (1, 2)
    _write(run, [STARTED])
    assert watch.poll()[1].step == 0


def test_the_summary_of_a_long_run_reads_its_tail() -> None:
    run = create_run(toy_plan(steps=5000), "long")
    _write(run, [STARTED, *(toy_step(step, float(step)) for step in range(1, 5001))])
    summary = summarise_run(run)
    assert (summary.state.status, summary.state.step, summary.state.steps) == ("lost", 5000, 5000)
    assert (summary.model, summary.adapter_name, summary.state.loss) == ("toy", "long", 5000.0)


def test_a_damaged_run_does_not_hide_the_others() -> None:
    create_run(toy_plan(), "good")
    half = create_run(toy_plan(), "half")
    half.plan_file.write_bytes(half.plan_file.read_bytes()[:100])
    empty = create_run(toy_plan(), "empty")
    empty.plan_file.unlink()
    found = {summary.id: summary.state for summary in summarise_runs()}
    assert {name: state.status for name, state in found.items()} == {
        "good-1": "lost", "half-1": "damaged", "empty-1": "damaged",
    }  # fmt: skip
    assert "missing" in found["empty-1"].message


def test_listing_500_long_runs_is_fast(edgepeft_home: Path) -> None:
    content = b"".join(encode_event(event) for event in [STARTED, *map(toy_step, range(1, 400))])
    for number in range(500):
        run = create_run(toy_plan(), f"r{number}")
        run.events_file.write_bytes(content)
    began = time.perf_counter()
    assert len(summarise_runs()) == 500
    # 0.2 s on two busy cores; reading everything would take several times as long.
    assert time.perf_counter() - began < 2.0


def test_a_clock_that_goes_back_tells_nothing_absurd(monkeypatch: pytest.MonkeyPatch) -> None:
    run = create_run(toy_plan(), "jumped")
    clock = 1_000_000.0
    monkeypatch.setattr(time, "time", lambda: clock)
    with EventWriter(run.events_file) as events:
        events.write(STARTED)
        events.write(toy_step(1, seconds=4.0))
        events.write(Failed(message="m", exit_code=1))
        launched = Launched(time=time.time(), events_bytes=run.events_file.stat().st_size)
        run.launched_file.write_bytes(msgspec.json.encode(launched))
        with RunLock(run):
            assert read_state(run).status == summarise_run(run).state.status == "starting"
            # The clock is set back by a day, and the new worker speaks.
            clock -= 86_400.0
            events.write(Started(step=1, steps=9, device="cpu", versions={}))
            events.write(toy_step(2, seconds=5.0))
            state = read_state(run)
            assert state.status == summarise_run(run).state.status == "running"
            assert state.train_seconds == 9.0
            assert state.eta_seconds == 12.0
            told = CliRunner().invoke(app, ["runs", "list"]).output
            told += CliRunner().invoke(app, ["runs", "show", run.id]).output
            assert "running" in told
            assert not re.search(r"(?<![\w/])-\d", told)
            # What a launcher wrote before the jump lies in the future: that keeps no run starting for a day.
        assert read_state(run).status == "lost"
        events.write(toy_step(3))
    run.events_file.unlink()
    launched = Launched(time=clock + 86_400.0, events_bytes=0)
    run.launched_file.write_bytes(msgspec.json.encode(launched))
    assert read_state(run).status == "lost"


def test_the_live_line_counts_by_durations(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = toy_plan()
    view = attaching._LiveView(plan)
    shown: list[float] = []
    monkeypatch.setattr(attaching, "live_lines", lambda state, predicted, seconds: shown.append(seconds) or Text(""))
    try:
        view.show([], RunState("running", steps=9, started_at=5e9, train_seconds=30.0))
        monkeypatch.setattr(time, "time", lambda: 0.0)
        view._render()
        view.show([], RunState("running", steps=9, started_at=5e9, train_seconds=90.0))
        view._render()
    finally:
        view.close()
    assert shown
    assert all(30.0 <= seconds < 60.0 for seconds in shown)


@pytest.mark.parametrize(
    ("ended_by", "said"),
    [
        ("steps", ""),
        ("time", "Its training time was over after step 4 of 9"),
        ("early stop", "Ended early after step 4 of 9: the held-out loss did not fall any more"),
    ],
)
def test_a_run_that_ended_by_itself_is_finished_and_says_why(ended_by: EndedBy, said: str) -> None:
    ending = msgspec.structs.replace(FINISHED, step=4, ended_by=ended_by)
    state = fold([STARTED, toy_step(4), ending], lock_held=False)
    assert (state.status, state.message, state.ended_by) == ("finished", said, ended_by)
    assert not state.resumable
    assert state.wants_time == (ended_by == "time")
    # Given more time, it runs again, and nothing of its ending stays.
    again = fold([STARTED, toy_step(4), ending, msgspec.structs.replace(STARTED, step=4)], lock_held=True)
    assert (again.status, again.message, again.ended_by, again.wants_time) == ("running", "", None, False)


def test_a_stopped_run_of_before_was_stopped_by_request() -> None:
    state = fold([STARTED, msgspec.structs.replace(FINISHED, step=4, stopped=True)], lock_held=False)
    assert (state.status, state.ended_by, state.resumable) == ("stopped", "request", True)
