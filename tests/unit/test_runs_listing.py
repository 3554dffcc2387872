"""The list of runs that is looked at again and again: it reads what may have changed, and only that."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from edgepeft.runs import listing
from edgepeft.runs.events import Failed, Started
from edgepeft.runs.events_file import EventWriter
from edgepeft.runs.layout import RunFolder, create_run
from edgepeft.runs.listing import RunListing
from edgepeft.runs.lock import RunLock
from edgepeft.runs.state import RunSummary, summarise_run
from toy_run import toy_plan, toy_step


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids that were really read."""
    seen: list[str] = []

    def summarise(run: RunFolder) -> RunSummary:
        seen.append(run.id)
        return summarise_run(run)

    monkeypatch.setattr(listing, "summarise_run", summarise)
    return seen


def say(run: RunFolder, *events: object) -> None:
    with EventWriter(run.events_file) as writer:
        for event in events:
            writer.write(event)  # type: ignore[arg-type]


def test_only_what_may_have_changed_is_read_again(read: list[str]) -> None:
    old, new = create_run(toy_plan(), "old"), create_run(toy_plan(), "new")
    for run in (old, new):
        say(run, Started(step=0, steps=6, device="toy", versions={}), toy_step(1))
    os.utime(old.plan_file, (1, 1))
    runs = RunListing()
    assert [(found.id, found.state.status, found.state.step) for found in runs.read()] == [
        ("new-1", "lost", 1),
        ("old-1", "lost", 1),
    ]
    read.clear()
    runs.read()
    assert read == []
    say(old, Failed(message="it broke", exit_code=5))
    assert [found.state.status for found in runs.read()] == ["lost", "failed"]
    assert read == ["old-1"]


def test_a_worker_that_takes_the_lock_is_seen_though_it_has_not_spoken(read: list[str]) -> None:
    run = create_run(toy_plan(), "toy")
    say(run, Started(step=0, steps=6, device="toy", versions={}), toy_step(1))
    runs = RunListing()
    assert runs.read()[0].state.status == "lost"
    with RunLock(run):
        assert runs.read()[0].state.alive
        assert runs.read()[0].state.alive
    assert runs.read()[0].state.status == "lost"


def test_removed_and_damaged_runs(edgepeft_home: Path) -> None:
    run = create_run(toy_plan(), "toy")
    runs = RunListing()
    assert len(runs.read()) == 1
    run.plan_file.write_text("{")
    (found,) = runs.read()
    assert found.state.status == "damaged"
    run.path.rename(edgepeft_home / "elsewhere")
    assert runs.read() == []


def test_many_come_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_CHUNK", 2)
    for name in ("a", "b", "c"):
        create_run(toy_plan(), name)
    assert [len(chunk) for chunk in RunListing().read_in_chunks()] == [2, 1]


def test_five_hundred_runs_are_read_again_at_once() -> None:
    run = create_run(toy_plan(), "toy")
    say(run, Started(step=0, steps=6, device="toy", versions={}), toy_step(1))
    for number in range(2, 501):
        folder = run.path.with_name(f"toy-{number}")
        folder.mkdir()
        for file in (run.plan_file, run.events_file):
            os.link(file, folder / file.name)
    runs = RunListing()
    assert len(runs.read()) == 500
    begun = time.perf_counter()
    runs.read()
    # Some 15 ms; ten times that on a machine that does other things.
    assert time.perf_counter() - begun < 0.3
