"""The terminal UI and the real training worker on a tiny model, each a real process, each killed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import cast

import msgspec
import pytest
from textual.pilot import Pilot

from edgepeft.plan.build import build
from edgepeft.plan.train_plan import TrainPlan
from edgepeft.runs.events import CheckpointSaved, Recovered, Started
from edgepeft.runs.events_file import read_events
from edgepeft.runs.launch import launch, log_tail, stop
from edgepeft.runs.layout import RunFolder, list_runs
from edgepeft.runs.lock import is_locked
from edgepeft.runs.state import read_launched, read_state
from edgepeft.spec import Upkeep
from edgepeft_tui import watching
from edgepeft_tui.app import EdgepeftApp
from edgepeft_tui.screens.train import TrainScreen
from edgepeft_tui.widgets.run_figures import RunFigures
from terminal import Terminal

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals")]
STEPS = 4000


@pytest.fixture(autouse=True)
def _no_worker_stays() -> Iterator[None]:
    yield
    for run in list_runs():
        if is_locked(run):
            kill_worker(run)


@pytest.fixture
def terminals() -> Iterator[Callable[[], Terminal]]:
    """Opens the program; all that were opened are ended."""
    opened: list[Terminal] = []

    def open_one() -> Terminal:
        opened.append(Terminal())
        return opened[-1]

    yield open_one
    for terminal in opened:
        terminal.kill()


@pytest.fixture
def plan(tiny_model: Path, alpaca_file: Path) -> TrainPlan:
    """More steps on the tiny model than any test waits for, with a checkpoint every fifth."""
    typed = {"gpu": "cpu", "precision": "bf16", "rank": 4, "epochs": 10_000.0, "max_steps": STEPS, "seed": 3}
    made = build(str(tiny_model), alpaca_file, typed)
    upkeep = Upkeep(eval_every_steps=500, checkpoint_steps=5)
    return msgspec.structs.replace(made, spec=msgspec.structs.replace(made.spec, upkeep=upkeep))


def pid_of(run: RunFolder) -> int:
    launched = read_launched(run.launched_file)
    assert launched is not None
    assert launched.pid is not None
    return launched.pid


def kill_worker(run: RunFolder) -> None:
    os.kill(pid_of(run), signal.SIGKILL)


def wait_for(run: RunFolder, condition: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, (read_state(run), log_tail(run))
        time.sleep(0.05)


def goes_on(run: RunFolder) -> None:
    """Waits for three more steps of a living worker."""
    before = read_state(run).step
    wait_for(run, lambda: read_state(run).step >= before + 3)
    assert read_state(run).status == "running"


def begun(run: RunFolder) -> int:
    return sum(isinstance(event, Started) for event in read_events(run.events_file))


Until = Callable[[Callable[[], object]], Awaitable[None]]


def attach(run: RunFolder, check: Callable[[EdgepeftApp, TrainScreen, Pilot[str], Until], Awaitable[None]]) -> None:
    """Watches the run in a UI of this process."""

    async def watch() -> None:
        app = EdgepeftApp()
        async with app.run_test(size=(120, 40), notifications=True) as pilot:
            await app.go("train", run=run.id)
            screen = cast(TrainScreen, app.screen)

            async def until(condition: Callable[[], object]) -> None:
                deadline = time.monotonic() + 60
                while not condition():
                    assert time.monotonic() < deadline, (screen._view and screen._view.state, log_tail(run))
                    await pilot.pause(0.05)

            await check(app, screen, pilot, until)

    asyncio.run(watch())


def test_a_killed_ui_and_a_closed_terminal_leave_the_run_and_a_new_ui_stops_it(
    plan: TrainPlan, terminals: Callable[[], Terminal]
) -> None:
    run = launch(plan, "watched")
    for leave in (Terminal.kill, Terminal.hang_up):
        terminal = terminals()
        terminal.until("Home")
        terminal.press("f4")
        terminal.until(rf"step +[\d,]+ / {STEPS:,}")
        leave(terminal)
        goes_on(run)
    assert begun(run) == 1

    async def stop_it(app: EdgepeftApp, screen: TrainScreen, pilot: Pilot[str], until: Until) -> None:
        await until(lambda: screen._view is not None and screen._view.state.step > 0)
        assert screen._view is not None
        assert screen._view.state.status == "running"
        assert len(screen._view.curves.loss.xs) > 5
        await pilot.press("s")
        await until(lambda: screen._view is not None and not screen._view.state.alive)
        assert screen._view.state.status == "stopped"
        assert Path(screen._view.adapter, "adapter_model.safetensors").is_file()
        await until(lambda: app._notifications)
        (toast,) = app._notifications
        assert "watched-1 stopped; peak" in toast.message
        assert "measured" in toast.message

    attach(run, stop_it)


def test_a_worker_that_hangs_is_told_and_ended_by_force(plan: TrainPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(watching, "SILENT_PHASE_SECONDS", 1.0)
    run = launch(plan, "deaf")
    wait_for(run, lambda: read_state(run).step >= 3)
    os.kill(pid_of(run), signal.SIGSTOP)

    async def end_it(app: EdgepeftApp, screen: TrainScreen, pilot: Pilot[str], until: Until) -> None:
        await until(lambda: screen._view is not None and screen._view.silent_seconds is not None)
        await until(lambda: "may hang" in str(screen.query_one(RunFigures).render()))
        await pilot.press("k", "right", "enter")
        await until(lambda: screen._view is not None and not screen._view.state.alive)
        assert screen._view.state.status == "lost"
        await pilot.pause(1.5)
        # It was ended on purpose: nobody starts it again.
        assert begun(run) == 1
        assert not is_locked(run)

    attach(run, end_it)


def test_a_worker_killed_before_the_eyes_of_the_ui_goes_on_once_and_is_lost_the_second_time(
    plan: TrainPlan, terminals: Callable[[], Terminal]
) -> None:
    run = launch(plan, "killed")
    terminal = terminals()
    terminal.until("Home")
    terminal.press("f4")
    terminal.until(rf"step +[\d,]+ / {STEPS:,}")
    wait_for(run, lambda: any(isinstance(event, CheckpointSaved) for event in read_events(run.events_file)))
    first = pid_of(run)
    kill_worker(run)
    wait_for(run, lambda: begun(run) == 2)
    assert pid_of(run) != first
    terminal.until("The worker was killed")
    goes_on(run)
    (recovered,) = (event for event in read_events(run.events_file) if isinstance(event, Recovered))
    assert recovered.cause == "killed"
    # The worker that this UI started is no part of it.
    terminal.kill()
    goes_on(run)
    again = terminals()
    again.until("Home")
    again.press("f4")
    again.until(rf"step +[\d,]+ / {STEPS:,}")
    kill_worker(run)
    again.until(r"Lost +step")
    assert read_state(run).status == "lost"
    assert begun(run) == 2


def test_a_lost_run_is_resumed_by_one_key_and_outlives_the_ui_that_resumed_it(
    plan: TrainPlan, terminals: Callable[[], Terminal]
) -> None:
    run = launch(plan, "again")
    wait_for(run, lambda: (read_state(run).checkpoint_step or 0) >= 5)
    kill_worker(run)
    wait_for(run, lambda: not is_locked(run))
    terminal = terminals()
    terminal.until("Home")
    terminal.press("f4")
    terminal.until(r"Lost +step")
    terminal.press("space")
    wait_for(run, lambda: begun(run) == 2)
    terminal.until(r"ETA")
    terminal.kill()
    goes_on(run)
    assert stop(run, 60.0).status == "stopped"


def test_a_ui_that_hears_no_hang_up_ends_with_its_terminal() -> None:
    terminal = Terminal(ignores_hang_up=True)
    try:
        terminal.until("Home")
        assert terminal.hang_up() == 129
    finally:
        terminal.kill()
