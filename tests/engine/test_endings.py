"""How a run ends, and with which state: early, in time, or because it diverges; and what it says of its base."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from edgepeft.engine.training.checkpoints import RunPosition
from edgepeft.engine.training.divergence import (
    WINDOW_STEPS,
    Diverged,
    check_divergence,
    followed,
    is_sound,
    with_sound_step,
)
from edgepeft.engine.training.ending import Kept, complaint_about, reason_to_end
from edgepeft.engine.training.evaluation import Evaluations, HeldOutLoss
from edgepeft.engine.training.held_out import verdict_on_base
from edgepeft.library.store import resolve_adapter
from edgepeft.methods import LoraConfig
from edgepeft.models.store import ModelEntry
from edgepeft.runs.control import request
from edgepeft.runs.events import CheckpointSaved, Evaluated, Finished, Started, StepDone, Warned
from edgepeft.runs.layout import RunFolder
from edgepeft.runs.state import RunWatch
from edgepeft.spec import Layout, Optimizer, Schedule, Upkeep
from training_runs import of_type, tiny_base, tiny_run, train

POSITION = RunPosition(step=7, layout=Layout(micro_batch_tokens=10))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture
def base(tmp_path: Path) -> ModelEntry:
    return tiny_base(tmp_path)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def script_losses(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    """Evaluations find these losses, by step."""

    def evaluate(self: Evaluations, layout: Layout, step: int) -> HeldOutLoss:
        return HeldOutLoss(losses[step], 3, 30)

    monkeypatch.setattr(Evaluations, "evaluate", evaluate)


# Early stopping and the best state ----------------------------------------------------------------------------------


def test_a_run_ends_early_and_its_best_state_is_published(
    tmp_path: Path, base: ModelEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_losses(monkeypatch, {0: 5.0, 2: 3.0, 4: 2.0, 6: 2.0, 8: 2.1, 10: 1.0, 12: 0.5})
    options = {"max_steps": 12, "schedule": Schedule(name="constant")}
    run = tiny_run(tmp_path, base, "early", eval_every_steps=2, early_stop=2, keep="best", **options)
    events = train(run)
    (finished,) = of_type(events, Finished)
    # An equal loss is no gain.
    assert (finished.ended_by, finished.step, finished.kept_step) == ("early stop", 8, 4)
    assert (finished.eval_loss, finished.last_eval_loss, finished.base_eval_loss) == (2.0, 2.1, 5.0)
    assert not finished.stopped


def test_the_best_state_is_the_one_that_a_run_of_so_many_steps_ends_with(
    tmp_path: Path, base: ModelEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"schedule": Schedule(name="constant", warmup_fraction=0.0), "epochs": 50.0}
    short = tiny_run(tmp_path, base, "short", max_steps=4, **options)
    train(short)
    script_losses(monkeypatch, {0: 5.0} | {step: 1.0 + abs(step - 4) for step in range(1, 31)})
    long = tiny_run(
        tmp_path, base, "long", max_steps=30, eval_every_steps=2, early_stop=3, keep="best", checkpoint_steps=1,
        **options,
    )  # fmt: skip
    kept: list[str] = []

    def look(event: Any) -> None:
        if isinstance(event, CheckpointSaved):
            kept[:] = sorted(path.name for path in long.checkpoints.iterdir())

    (finished,) = of_type(train(long, look), Finished)
    assert (finished.step, finished.kept_step, finished.published) == (10, 4, "long@v1")
    assert same(weights(long.adapter), weights(short.adapter))
    # The newest two, the best one, and what the run would go back to if it diverged.
    assert kept == ["step-1", "step-10", "step-4", "step-6", "step-9"]
    card = resolve_adapter("long@v1").card
    assert card is not None
    assert card.steps == 4
    assert (card.metrics["eval_loss"], card.metrics["last_eval_loss"], card.metrics["last_step"]) == (1.0, 7.0, 10.0)
    assert card.metrics["base_eval_loss"] == 5.0
    # Four steps of five samples each, of the 21 that are not held out.
    assert card.metrics["train_samples"] == 20
    assert any("the state of step 4 is kept" in note for note in card.notes)


@pytest.mark.parametrize(("last", "kept"), [(1.0005, 6), (1.1, 2), (math.nan, 2)])
def test_the_best_state_must_be_clearly_better_than_the_last(
    tmp_path: Path, base: ModelEntry, monkeypatch: pytest.MonkeyPatch, last: float, kept: int
) -> None:
    script_losses(monkeypatch, {0: 5.0, 2: 1.0, 4: 2.0, 6: last})
    run = tiny_run(tmp_path, base, eval_every_steps=2, keep="best")
    (finished,) = of_type(train(run), Finished)
    assert (finished.ended_by, finished.step, finished.kept_step) == ("steps", 6, kept)


def test_without_it_the_last_state_is_kept(tmp_path: Path, base: ModelEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    script_losses(monkeypatch, {0: 5.0, 2: 1.0, 4: 2.0, 6: 3.0})
    run = tiny_run(tmp_path, base, eval_every_steps=2)
    (finished,) = of_type(train(run), Finished)
    assert (finished.kept_step, finished.eval_loss) == (6, 3.0)
    assert {path.name for path in run.checkpoints.iterdir()} == {"step-6"}


def stop_at(step: int, run: RunFolder) -> Any:
    def hook(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == step:
            request(run, "stop")

    return hook


def test_patience_and_the_best_state_survive_stops(tmp_path: Path, base: ModelEntry) -> None:
    options: dict[str, Any] = {
        "max_steps": 60,
        "epochs": 50.0,
        "eval_every_steps": 4,
        "early_stop": 2,
        "keep": "best",
        "optimizer": Optimizer(learning_rate=3e-2),
        "schedule": Schedule(name="constant"),
        "method": LoraConfig(rank=4, alpha=8.0, dropout=0.1),
    }
    whole, parts = tiny_run(tmp_path, base, "whole", **options), tiny_run(tmp_path, base, "parts", **options)
    events = train(whole)
    (finished,) = of_type(events, Finished)
    assert finished.ended_by == "early stop"
    assert finished.kept_step == finished.step - 8
    # A stop after a step whose evaluation is due comes before that: it is made up for.
    for step in (8, finished.kept_step, finished.step - 2):
        (stopped,) = of_type(train(parts, stop_at(step, parts)), Finished)
        assert (stopped.ended_by, stopped.step, stopped.kept_step) == ("request", step, step)
    again = train(parts)
    (ending,) = of_type(again, Finished)
    assert (ending.step, ending.kept_step, ending.ended_by) == (finished.step, finished.kept_step, "early stop")
    assert same(weights(parts.adapter), weights(whole.adapter))
    assert not [found for found in of_type(again, Evaluated) if found.step == 0]
    # Killed just before its last word, it ends at once and does not train on.
    more = train(parts)
    assert not of_type(more, StepDone)
    assert of_type(more, Finished)[0].published == "parts@v1"


def test_a_best_state_that_is_gone_is_told_and_another_one_found(
    tmp_path: Path, base: ModelEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_losses(monkeypatch, {0: 5.0, 2: 1.0, 4: 2.0, 6: 3.0})
    run = tiny_run(tmp_path, base, eval_every_steps=2, keep="best", checkpoint_steps=1)
    train(run, stop_at(3, run))
    shutil.rmtree(run.checkpoints / "step-2")
    events = train(run)
    assert any("best state so far, of step 2, is gone" in warning.message for warning in of_type(events, Warned))
    assert of_type(events, Finished)[0].kept_step == 4

    damaged = tiny_run(tmp_path, base, "damaged", eval_every_steps=2, keep="best", checkpoint_steps=1)
    train(damaged, stop_at(3, damaged))
    file = damaged.checkpoints / "step-2" / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    events = train(damaged)
    assert any("of step 2, is damaged; the last one is kept" in found.message for found in of_type(events, Warned))
    assert of_type(events, Finished)[0].kept_step == 6


# Time ---------------------------------------------------------------------------------------------------------------


def test_when_the_time_is_over_the_run_is_finished_and_can_be_given_more(tmp_path: Path, base: ModelEntry) -> None:
    whole = tiny_run(tmp_path, base, "whole")
    train(whole)
    # Less than a step takes: one is made all the same.
    run = tiny_run(tmp_path, base, "timed", max_seconds=1e-6)
    events = train(run)
    (finished,) = of_type(events, Finished)
    assert (finished.ended_by, finished.step, finished.stopped) == ("time", 1, False)
    assert finished.published == "timed@v1"
    assert finished.eval_loss is not None
    assert all(done.eta_seconds == 0.0 for done in of_type(events, StepDone))
    # Nothing is left of its time.
    assert not of_type(train(run), StepDone)
    run.time_limit_file.write_bytes(msgspec.json.encode(1000.0))
    (ending,) = of_type(train(run), Finished)
    assert (ending.ended_by, ending.step, ending.published) == ("steps", 6, "timed@v2")
    assert same(weights(run.adapter), weights(whole.adapter))


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, base: ModelEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    calm = tiny_run(tmp_path, base, "calm", max_seconds=600.0)
    train(calm)
    run = tiny_run(tmp_path, base, "jumping", max_seconds=600.0)
    jump = iter(range(10**6))
    with monkeypatch.context() as patch:
        # A day back and a day on, at every look.
        patch.setattr(time, "time", lambda: 2e9 + 86_400.0 * (-1) ** next(jump))
        (finished,) = of_type(train(run), Finished)
    assert (finished.ended_by, finished.step) == ("steps", 6)
    assert 0 < finished.train_seconds < 60
    assert same(weights(run.adapter), weights(calm.adapter))


@pytest.mark.parametrize(
    ("changes", "upkeep", "reason"),
    [
        ({}, {}, None),
        ({"step": 10}, {}, "steps"),
        ({"evaluations_without_gain": 99}, {}, None),
        ({"evaluations_without_gain": 2}, {"early_stop": 3}, None),
        ({"evaluations_without_gain": 3}, {"early_stop": 3}, "early stop"),
        ({"train_seconds": 59.9}, {"max_seconds": 60.0}, None),
        ({"train_seconds": 60.0}, {"max_seconds": 60.0}, "time"),
        ({"train_seconds": 60.0, "step": 10}, {"max_seconds": 60.0}, "steps"),
    ],
)
def test_reasons_to_end(changes: dict[str, Any], upkeep: dict[str, Any], reason: str | None) -> None:
    assert reason_to_end(msgspec.structs.replace(POSITION, **changes), 10, Upkeep(**upkeep)) == reason


# The base -----------------------------------------------------------------------------------------------------------


def test_the_base_is_measured_first_and_alone(tmp_path: Path, base: ModelEntry) -> None:
    run = tiny_run(tmp_path, base)
    events = train(run)
    first, last = of_type(events, Evaluated)
    assert (first.step, first.best) == (0, False)
    (finished,) = of_type(events, Finished)
    assert (finished.base_eval_loss, finished.eval_loss) == (first.loss, last.loss)
    index = events.index(first)
    assert not of_type(events[:index], StepDone)
    # Random weights over 260 tokens are worse than chance here.
    (warning,) = (found for found in of_type(events, Warned) if "guessing all 260 tokens" in found.message)
    assert warning.step == 0
    # An adapter that does nothing is the base.
    still = tiny_run(tmp_path, base, "still", max_steps=1, optimizer=Optimizer(learning_rate=1e-30))
    found = of_type(train(still), Evaluated)
    assert found[1].loss == pytest.approx(found[0].loss, rel=1e-6)


def test_an_adapter_that_is_no_better_than_its_base_is_told(
    tmp_path: Path, base: ModelEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_losses(monkeypatch, {0: 2.0, 6: 2.0})
    events = train(tiny_run(tmp_path, base))
    assert any("no better than its base" in warning.message for warning in of_type(events, Warned))
    assert not complaint_about(Kept(6, 1.9), 2.0)
    assert not complaint_about(Kept(6, None), 2.0)
    assert not complaint_about(Kept(6, 1.9), None)


def test_nothing_held_out_is_no_evaluation(tmp_path: Path, base: ModelEntry) -> None:
    run = tiny_run(tmp_path, base)
    plan = run.read_plan()
    recipe = plan.spec.recipe
    data = msgspec.structs.replace(recipe.data, eval_fraction=0.0)
    spec = msgspec.structs.replace(plan.spec, recipe=msgspec.structs.replace(recipe, data=data))
    run.plan_file.write_bytes(msgspec.json.encode(msgspec.structs.replace(plan, spec=spec)))
    events = train(run)
    assert not of_type(events, Evaluated)
    (finished,) = of_type(events, Finished)
    assert (finished.base_eval_loss, finished.eval_loss) == (None, None)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (math.log(49_152) + 0.01, "guessing all 49,152 tokens"),
        (math.nan, "guessing all 49,152 tokens"),
        (math.log(49_152) - 0.01, ""),
        (0.1, ""),
        (0.09, "already good"),
        (0.0, "already good"),
    ],
)
def test_what_is_said_of_the_base(loss: float, said: str) -> None:
    verdict = verdict_on_base(loss, 49_152)
    assert said in verdict
    assert bool(verdict) == bool(said)


def test_a_base_that_is_measured_again_counts_once(tmp_path: Path, base: ModelEntry) -> None:
    from edgepeft.runs.events_file import EventWriter

    run = tiny_run(tmp_path, base)
    events = train(run)
    with EventWriter(run.events_file) as writer:
        # Killed in its first step, without a checkpoint.
        for event in [*events[: events.index(of_type(events, StepDone)[0])], *events]:
            writer.write(event)
    watch = RunWatch(run)
    watch.poll()
    assert len(of_type(events, Started)) == 1
    assert [found.step for found in watch.folded.evaluations] == [0, 6]


# Divergence ---------------------------------------------------------------------------------------------------------


def test_an_absurd_rate_ends_the_run_with_a_diagnosis_and_the_last_good_state(tmp_path: Path, base: ModelEntry) -> None:
    options: dict[str, Any] = {
        "max_steps": 400,
        "epochs": 400.0,
        "checkpoint_steps": 1,
        "optimizer": Optimizer(learning_rate=200.0),
        # The rate rises from nothing to the absurd, so that there is something good before it.
        "schedule": Schedule(name="constant", warmup_fraction=0.5),
    }
    run = tiny_run(tmp_path, base, **options)
    told: list[Any] = []
    with pytest.raises(Diverged) as caught:
        train(run, told.append)
    assert "diverged" in str(caught.value)
    assert "far below 200" in str(caught.value)
    last = of_type(told, StepDone)[-1].step
    assert last < 400
    newest = of_type(told, CheckpointSaved)[-1].step
    good = min(int(path.name.removeprefix("step-")) for path in run.checkpoints.iterdir())
    assert good < newest - 10
    assert len(list(run.checkpoints.iterdir())) <= 4
    losses = [done.loss for done in of_type(told, StepDone)]
    assert f"after step {good}" in caught.value.hint
    assert good <= last - 10
    assert losses[good - 1] < 0.7 * losses[-1]
    # What is in the folder is that state, and no version of the library.
    state = load_file(run.checkpoints / f"step-{good}" / "adapter.safetensors")
    saved = weights(run.adapter)
    assert all(torch.equal(saved[f"base_model.model.{name}"], value) for name, value in state.items())
    assert not of_type(told, Finished)


def test_without_a_checkpoint_there_is_no_good_state(
    tmp_path: Path, base: ModelEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgepeft.engine.training import step as step_module

    real = step_module.summed_loss
    monkeypatch.setattr(step_module, "summed_loss", lambda *arguments: real(*arguments) * math.inf)
    run = tiny_run(tmp_path, base)
    with pytest.raises(Diverged, match="there is no checkpoint from before"):
        train(run)
    assert not run.adapter.exists()


def test_a_checkpoint_is_sound_once_later_steps_bear_it_out() -> None:
    position, recent, lowest = POSITION, (), None
    found = []
    for step, loss in enumerate([2.0] * 12 + [9.0] * 8 + [2.0] * 12, 1):
        recent, lowest = followed(recent, lowest, loss)
        position = msgspec.structs.replace(position, step=step, recent_losses=recent, lowest_recent_loss=lowest)
        position = with_sound_step(position)
        found.append(position.sound_step)
    # The state after step 12 gave the first bad loss.
    assert found[4:6] == [-1, 1]
    assert set(found[12:26]) == {6}
    assert found[-1] >= 24


def position_after(losses: list[float]) -> RunPosition:
    recent: tuple[float, ...] = ()
    lowest = None
    for loss in losses:
        recent, lowest = followed(recent, lowest, loss)
    return msgspec.structs.replace(POSITION, step=len(losses), recent_losses=recent, lowest_recent_loss=lowest)


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        # ln 100 is 4.6: clearly below it, nothing is called divergence.
        ([1.0] * 30 + [4.3] * 30, False),
        ([1.0] * 30 + [6.0] * 30, True),
        ([1.0] * 30 + [4.45] * 30, True),
        # Twice as bad as it ever was, no less.
        ([4.0] * 30 + [7.9] * 30, False),
        ([4.0] * 30 + [8.1] * 30, True),
        # One bad step, or a few, are none.
        ([1.0] * 30 + [50.0] + [1.0] * 30, False),
        ([1.0] * 30 + [9.0] * 8, False),
        # Bad from the second step on: the first was the base's own loss.
        ([2.0] + [50.0] * 20, True),
        ([2.0] + [50.0] * 18, False),
        # A base that knew nothing, and learns.
        ([12.0, 11.0, 10.0] * 10, False),
    ],
)
def test_what_counts_as_divergence(losses: list[float], diverged: bool) -> None:
    assert WINDOW_STEPS == 20
    position = position_after(losses)
    if diverged:
        with pytest.raises(Diverged, match="has diverged"):
            check_divergence(position, 1e-3, 100)
        assert not is_sound(position.recent_losses, position.lowest_recent_loss)
    else:
        check_divergence(position, 1e-3, 100)
