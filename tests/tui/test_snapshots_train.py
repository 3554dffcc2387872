"""Pictures of the Train screen at three sizes, from recorded runs."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
from textual.pilot import Pilot

from edgepeft.runs.layout import RunFolder
from edgepeft.runs.lock import RunLock
from edgepeft_tui import app as ui
from edgepeft_tui import watching
from edgepeft_tui.app import EdgepeftApp
from edgepeft_tui.readings import Machine, Shelves, listed_runs
from edgepeft_tui.screens import run_following
from edgepeft_tui.screens import train as train_screen
from edgepeft_tui.screens.train import TrainScreen
from edgepeft_tui.widgets.chart import Chart
from recorded_runs import (
    BEGAN,
    damaged,
    finished,
    killed_mid_line,
    out_of_memory_then_recovered,
    ten_thousand_steps,
    two_runs,
)

SIZES = [(120, 40), (80, 24), (60, 20)]
Snap = Callable[..., bool]


@pytest.fixture(autouse=True)
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine, a clock and a time zone that are the same everywhere."""
    listed_runs.cache_clear()
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    monkeypatch.setattr(ui, "read_machine", lambda: Machine("NVIDIA GeForce RTX 4090 · driver 580.82", ()))
    monkeypatch.setattr(ui, "read_shelves", lambda: Shelves((), (), ()))
    monkeypatch.setattr(train_screen, "DRAW_SECONDS", 0.0)
    monkeypatch.setattr(run_following, "now", lambda: BEGAN + 7200)
    monkeypatch.setattr(watching, "now", lambda: BEGAN + 445)


def showing(run: RunFolder, then: Callable[[Pilot[str]], Awaitable[None]] | None = None) -> Any:
    """Goes to the run and waits until everything of it is drawn."""

    async def before(pilot: Pilot[str]) -> None:
        app = cast(EdgepeftApp, pilot.app)
        await app.workers.wait_for_complete()
        await app.go("train", run=run.id)
        screen = cast(TrainScreen, app.screen)
        await settled(pilot, lambda: screen._view is not None and bool(screen._summaries))
        for chart in ("#curve", "#memory"):
            await settled(pilot, lambda chart=chart: bool(screen.query_one(chart, Chart).picture.lines))
        if then is not None:
            await then(pilot)
        await pilot.pause(0.3)

    return before


async def settled(pilot: Pilot[str], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await pilot.pause(0.02)


@pytest.mark.parametrize("size", SIZES)
def test_a_run_that_trains_beside_others(snap_compare: Snap, size: tuple[int, int]) -> None:
    finished(made=BEGAN - 5)
    killed_mid_line()
    run = out_of_memory_then_recovered()
    damaged()
    with RunLock(run):
        assert snap_compare(EdgepeftApp(), terminal_size=size, run_before=showing(run))


@pytest.mark.parametrize("size", SIZES)
def test_a_finished_run(snap_compare: Snap, size: tuple[int, int]) -> None:
    assert snap_compare(EdgepeftApp(), terminal_size=size, run_before=showing(finished()))


def test_a_lost_run_and_one_lying_over_it(snap_compare: Snap) -> None:
    first, _ = two_runs()
    killed_mid_line()

    async def lay_over(pilot: Pilot[str]) -> None:
        screen = cast(TrainScreen, pilot.app.screen)
        screen._lay_over("second-1")
        await settled(pilot, lambda: len(screen.query_one("#curve", Chart).picture.lines) == 3)

    assert snap_compare(EdgepeftApp(), terminal_size=(120, 40), run_before=showing(first, lay_over))


def test_ten_thousand_steps(snap_compare: Snap) -> None:
    assert snap_compare(EdgepeftApp(), terminal_size=(120, 40), run_before=showing(ten_thousand_steps()))
