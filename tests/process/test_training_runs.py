"""The real training worker on a tiny model: killed, resumed, stopped, refused."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from edgepeft.cli.app import app
from edgepeft.cli.attach import attach
from edgepeft.errors import BadInput
from edgepeft.library.store import resolve_adapter
from edgepeft.plan.build import build
from edgepeft.plan.train_plan import TrainPlan
from edgepeft.runs.events import CheckpointSaved, Finished, Recovered, Started, StepDone
from edgepeft.runs.events_file import read_events
from edgepeft.runs.launch import launch, log_tail, resume, stop
from edgepeft.runs.layout import RunFolder, list_runs
from edgepeft.runs.lock import is_locked
from edgepeft.runs.state import RunWatch, read_launched, read_state
from edgepeft.spec import Upkeep

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="signals")]


@pytest.fixture(autouse=True)
def _no_worker_stays() -> Iterator[None]:
    yield
    for run in list_runs():
        launched = read_launched(run.launched_file)
        if is_locked(run) and launched is not None and launched.pid is not None:
            os.kill(launched.pid, signal.SIGKILL)


@pytest.fixture
def plan(tiny_model: Path, alpaca_file: Path) -> TrainPlan:
    """60 steps on the tiny model, with a checkpoint every fifth."""
    typed = {"gpu": "cpu", "precision": "nf4", "rank": 4, "epochs": 100.0, "max_steps": 60, "seed": 3}
    made = build(str(tiny_model), alpaca_file, typed)
    upkeep = Upkeep(eval_every_steps=30, checkpoint_steps=5)
    return msgspec.structs.replace(made, spec=msgspec.structs.replace(made.spec, upkeep=upkeep))


def wait_for(run: RunFolder, condition: Callable[[], bool], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, (read_state(run), log_tail(run))
        time.sleep(0.02)


def test_kill_is_lost_and_resume_finishes_what_was_begun(plan: TrainPlan) -> None:
    run = launch(plan, "tiny")
    watch = RunWatch(run)

    def well_under_way() -> bool:
        state = watch.poll()[1]
        assert state.status in ("starting", "running"), (state, log_tail(run))
        return (state.checkpoint_step or 0) >= 5 and state.step >= 7

    wait_for(run, well_under_way)
    launched = read_launched(run.launched_file)
    assert launched is not None
    assert launched.pid is not None
    os.kill(launched.pid, signal.SIGKILL)
    wait_for(run, lambda: not is_locked(run))
    lost = read_state(run)
    assert lost.status == "lost"
    assert lost.step < 60

    resume(run)
    wait_for(run, lambda: not read_state(run).alive)
    state = read_state(run)
    assert state.status == "finished", (state, log_tail(run))
    assert state.published == "tiny@v1"
    events = read_events(run.events_file)
    begun = [event for event in events if isinstance(event, Started)]
    saved = [event.step for event in events[: events.index(begun[1])] if isinstance(event, CheckpointSaved)]
    assert [event.step for event in begun] == [0, saved[-1]]
    watch.poll()
    assert [done.step for done in watch.folded.history] == list(range(1, 61))
    adapter = resolve_adapter("tiny")
    assert adapter.card is not None
    assert adapter.card.run == run.id
    wait_for(run, lambda: not is_locked(run))


def test_a_followed_worker_that_is_killed_finishes_in_a_smaller_layout(plan: TrainPlan) -> None:
    run = launch(plan, "followed")

    def kill() -> None:
        wait_for(run, lambda: read_state(run).step >= 7)
        launched = read_launched(run.launched_file)
        assert launched is not None
        assert launched.pid is not None
        os.kill(launched.pid, signal.SIGKILL)

    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill)
        code = attach(run, plan)
        killed.result()
    assert code == 0, log_tail(run)
    events = read_events(run.events_file)
    assert sum(isinstance(event, Started) for event in events) == 2
    (recovered,) = (event for event in events if isinstance(event, Recovered))
    assert recovered.cause == "killed"
    assert recovered.micro_batch_tokens < plan.spec.layout.micro_batch_tokens
    assert read_state(run).status == "finished"
    assert resolve_adapter("followed").card is not None


def test_stop_saves_what_there_is(plan: TrainPlan) -> None:
    run = launch(plan, "halted")
    wait_for(run, lambda: read_state(run).step >= 3)
    state = stop(run, 120.0)
    assert state.status == "stopped", (state, log_tail(run))
    ending = read_events(run.events_file)[-1]
    assert isinstance(ending, Finished)
    assert 3 <= ending.step < 60
    assert ending.published == ""
    assert (run.path / ending.adapter / "adapter_model.safetensors").is_file()
    assert 0 < ending.measured_peak_bytes < 2 * ending.predicted_peak_bytes


def test_data_that_changed_is_refused(plan: TrainPlan, alpaca_file: Path) -> None:
    alpaca_file.write_text(alpaca_file.read_text() * 2)
    run = launch(plan, "changed")
    wait_for(run, lambda: not read_state(run).alive)
    state = read_state(run)
    assert (state.status, state.exit_code) == ("failed", 3), state
    assert str(alpaca_file) in state.message
    assert not any(isinstance(event, StepDone) for event in read_events(run.events_file))


def test_a_run_whose_time_is_over_is_finished_and_trains_on_when_it_gets_more(plan: TrainPlan) -> None:
    upkeep = msgspec.structs.replace(plan.spec.upkeep, max_seconds=0.01, sample_prompts=("Repeat the number 3.",))
    run = launch(msgspec.structs.replace(plan, spec=msgspec.structs.replace(plan.spec, upkeep=upkeep)), "timed")
    wait_for(run, lambda: not read_state(run).alive)
    state = read_state(run)
    assert (state.status, state.wants_time, state.published) == ("finished", True, "timed@v1"), log_tail(run)
    assert 0 < state.step < 60
    shown = CliRunner().invoke(app, ["runs", "show", run.id])
    assert f"Reason   Its training time was over after step {state.step} of 60" in shown.output
    assert f"edgepeft runs resume {run.id} --max-time TIME" in shown.output
    assert "Repeat the number 3. →" in shown.output

    refused = CliRunner().invoke(app, ["runs", "resume", run.id])
    assert isinstance(refused.exception, BadInput)
    resumed = CliRunner().invoke(app, ["runs", "resume", run.id, "--max-time", "10min"])
    assert resumed.exit_code == 0, resumed.output
    assert "(base) →" in resumed.output
    again = read_state(run)
    assert (again.status, again.step, again.ended_by, again.published) == ("finished", 60, "steps", "timed@v2")
    watch = RunWatch(run)
    watch.poll()
    assert [done.step for done in watch.folded.history] == list(range(1, 61))
    assert watch.folded.evaluations[0].step == 0
