"""The trial before the first step: it meets the run's largest micro-batches, and leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edgepeft.data.packing import pack
from edgepeft.data.prepare import prepare
from edgepeft.engine.ledger import BudgetExceeded
from edgepeft.engine.training import preparation
from edgepeft.engine.training.memory import MemoryGauge, Size
from edgepeft.engine.training.probe import MOST_TRIALS, choose_trials
from edgepeft.memory.calibration import observations
from edgepeft.memory.target import CPU
from edgepeft.methods import LoraConfig
from edgepeft.models.store import ModelEntry
from edgepeft.plan import workloads
from edgepeft.plan.workloads import StepList
from edgepeft.runs.control import request
from edgepeft.runs.events import (
    Event,
    Finished,
    MemoryMeasured,
    PhaseChanged,
    Started,
    StepDone,
    Warned,
)
from edgepeft.runs.layout import RunFolder
from training_runs import of_type, tiny_base, tiny_plan, tiny_run, train


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture
def base(tmp_path: Path) -> ModelEntry:
    return tiny_base(tmp_path)


def assert_same(run: RunFolder, other: RunFolder) -> None:
    expected = load_file(other.adapter / "adapter_model.safetensors")
    for name, value in load_file(run.adapter / "adapter_model.safetensors").items():
        assert torch.equal(value, expected[name]), name


def told(events: list[Event]) -> list[str]:
    return [event.detail for event in of_type(events, PhaseChanged) if event.name == "train"]


def stop_after(run: RunFolder, step: int) -> Any:
    def hook(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            request(run, "stop")

    return hook


def steps_of(folder: Path, base: ModelEntry, **options: Any) -> tuple[Any, StepList]:
    spec = tiny_plan(folder, base, **options).spec
    table = prepare(spec.recipe.data, Path(base.folder)).train.limited(spec.recipe.max_seq_len, "truncate")
    tokens, trained = (np.asarray(counts, np.int64) for counts in table.trainable())
    return spec, StepList(tokens, trained, spec.recipe.samples_per_step, 6, spec.recipe.seed)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_with_and_without_it_a_run_is_bit_identical(
    tmp_path: Path, base: ModelEntry, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    options = {"method": LoraConfig(rank=4, dropout=dropout), "checkpoint_steps": 2}
    whole, parts, without = (tiny_run(tmp_path, base, name, **options) for name in ("whole", "parts", "without"))
    assert any(detail.startswith("trying the largest micro-batch") for detail in told(train(whole)))
    # Resumed, the probe meets states that exist already.
    train(parts, stop_after(parts, 3))
    events = train(parts)
    assert of_type(events, Started)[0].step == 3
    assert any(detail.startswith("trying the largest micro-batch") for detail in told(events))
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "_probe", lambda training: None)
        patch.setattr(preparation, "_create_state", lambda training: None)
        assert not any(detail.startswith("trying the largest") for detail in told(train(without)))
    assert_same(whole, without)
    assert_same(parts, without)


def test_parameters_states_gradients_and_generators_are_as_before(
    tmp_path: Path, base: ModelEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = preparation._probe
    compared: list[bool] = []

    def state(training: Any) -> list[torch.Tensor]:
        update = training.update
        return [
            torch.get_rng_state(),
            *(value.detach().clone() for value in update.parameters.values()),
            *(value.clone() for value in update.tensors().values()),
        ]

    def compare(training: Any) -> None:
        before, position = state(training), training.position
        real(training)
        compared.extend(torch.equal(one, other) for one, other in zip(before, state(training), strict=True))
        compared.append(all(parameter.grad is None for parameter in training.update.parameters.values()))
        compared.append(training.position == position)

    monkeypatch.setattr(preparation, "_probe", compare)
    run = tiny_run(tmp_path, base, method=LoraConfig(rank=4, dropout=0.5))
    train(run, stop_after(run, 3))
    train(run)
    assert len(compared) > 100
    assert all(compared)


def test_it_tries_what_needs_most_and_what_the_steps_hold(tmp_path: Path, base: ModelEntry) -> None:
    spec, run = steps_of(tmp_path, base)
    found = choose_trials(run, spec, base.shape, CPU)
    made = set()
    for step in range(run.steps):
        chosen = run.samples(step)
        for number, group in enumerate(pack([int(run.tokens[index]) for index in chosen], 160)):
            made.add((tuple(sorted(chosen[place] for place in group)), number > 0))
    assert 1 <= len(found) <= MOST_TRIALS
    assert all((tuple(sorted(size.samples)), size.later) in made for size in found)
    assert found[0].tokens >= 0.9 * max(int(run.tokens[list(samples)].sum()) for samples, _ in made)


def test_only_steps_that_are_left_are_tried(tmp_path: Path, base: ModelEntry) -> None:
    spec, run = steps_of(tmp_path, base)
    last = choose_trials(run._replace(first=5), spec, base.shape, CPU)
    assert {size.step for size in last} == {5}


def test_a_bound_stands_for_the_largest_micro_batch_of_its_step(
    tmp_path: Path, base: ModelEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, run = steps_of(tmp_path, base)
    monkeypatch.setattr(workloads, "PACKED_STEPS", 0)
    found = choose_trials(run, spec, base.shape, CPU)
    assert found
    assert all(size.samples and int(run.tokens[list(size.samples)].sum()) == size.tokens for size in found)


def test_only_what_no_watched_micro_batch_covers_is_watched() -> None:
    gauge = MemoryGauge(torch.device("cpu"))
    for size in (Size(100, 20, 8), Size(60, 50, 8), Size(50, 10, 8, gradients=True)):
        assert gauge.wants(size)
        with gauge.watch(size):
            pass
    assert not gauge.wants(Size(100, 20, 8))
    assert not gauge.wants(Size(40, 10, 2, gradients=True))
    # Covered by none of the three, though no single figure is the largest.
    assert gauge.wants(Size(90, 40, 8))
    assert gauge.wants(Size(90, 20, 9))
    assert gauge.wants(Size(60, 10, 8, gradients=True))
    assert gauge.wants_evaluation(Size(1, 1, 1))
    with pytest.raises(BudgetExceeded), gauge.watch(Size(900, 900, 900)):
        raise BudgetExceeded
    assert gauge.wants(Size(900, 900, 900))
    with gauge.watch(Size(70, 70, 7), evaluation=True):
        pass
    assert not gauge.wants_evaluation(Size(1, 1, 1))
    assert gauge.wants(Size(70, 70, 7))


def test_what_is_predicted_to_need_less_is_not_watched() -> None:
    gauge = MemoryGauge(torch.device("cpu"))
    gauge.predict = lambda size: 10 * size.tokens + size.longest
    with gauge.watch(Size(100, 20, 8)):
        pass
    assert not gauge.wants(Size(90, 50, 8))
    assert gauge.wants(Size(98, 30, 8))
    assert gauge.wants(Size(101, 10, 8))


def test_memory_is_measured_by_category_and_adds_up(tmp_path: Path, base: ModelEntry) -> None:
    run = tiny_run(tmp_path, base, eval_every_steps=3)
    events = train(run)
    measured = of_type(events, MemoryMeasured)
    assert [found.phase for found in measured][:2] == ["load", "train step"]
    assert all(sum(found.by_category.values()) == found.peak_bytes for found in measured)
    assert all(found.rss_bytes and found.place for found in measured)
    top = measured[1].by_category
    adapter = top["adapter weights"]
    assert top["optimizer state"] - 2 * adapter <= 8 * 2 * 2 * 7
    assert top["gradients"] <= adapter
    assert top["frozen weights"] + top["embeddings and head"] >= base.weights_bytes * 0.95
    assert top["saved activations"] > 0
    (finished,) = of_type(events, Finished)
    assert sum(finished.measured_by_category.values()) == finished.measured_peak_bytes == finished.live_peak_bytes
    assert finished.measured_peak_bytes == max(found.peak_bytes for found in measured)
    assert finished.measured_place
    assert finished.reserved_peak_bytes is None
    assert finished.rss_peak_bytes is not None
    done = of_type(events, StepDone)
    # Between steps lives what outlives them: no activations, no gradients.
    kept = sum(top[name] for name in ("frozen weights", "embeddings and head", "adapter weights", "optimizer state"))
    assert {step.live_bytes for step in done} == {kept}
    assert all(step.rss_bytes and step.peak_bytes for step in done)
    assert of_type(events, Started)[0].rss_bytes


def test_a_stopped_and_resumed_run_reports_the_peak_of_both(tmp_path: Path, base: ModelEntry) -> None:
    run = tiny_run(tmp_path, base, checkpointing="none")
    first = of_type(train(run, stop_after(run, 2)), Finished)[0]
    events = train(run, smaller="killed")
    second = of_type(events, Finished)[0]
    assert max(found.peak_bytes for found in of_type(events, MemoryMeasured)) < first.measured_peak_bytes
    assert second.measured_peak_bytes == first.measured_peak_bytes
    assert second.measured_by_category == first.measured_by_category
    assert second.measured_place == first.measured_place


def test_stopping_in_the_probe_saves_and_learns_nothing(tmp_path: Path, base: ModelEntry) -> None:
    run = tiny_run(tmp_path, base)

    def hook(event: Event) -> None:
        if isinstance(event, PhaseChanged) and event.detail.startswith("trying the largest"):
            request(run, "stop")

    events = train(run, hook)
    (finished,) = of_type(events, Finished)
    assert (finished.stopped, finished.step) == (True, 0)
    assert not of_type(events, StepDone)
    whole = tiny_run(tmp_path, base, "whole")
    train(whole)
    train(run)
    assert_same(run, whole)


def test_a_finished_run_leaves_an_observation(tmp_path: Path, base: ModelEntry) -> None:
    run = tiny_run(tmp_path, base)
    (finished,) = of_type(train(run), Finished)
    (kept,) = observations("cpu", str(torch.__version__), "LlamaForCausalLM")
    assert (kept.run, kept.measured_bytes) == (run.id, finished.measured_peak_bytes)
    assert kept.predicted_bytes == run.read_plan().memory.peak_bytes
    assert kept.tokens_per_second == finished.tokens_per_second
    assert kept.seconds == finished.train_seconds


def test_a_stopped_run_and_one_with_another_layout_leave_none(tmp_path: Path, base: ModelEntry) -> None:
    stopped = tiny_run(tmp_path, base, "stopped")
    train(stopped, stop_after(stopped, 2))
    train(tiny_run(tmp_path, base, "smaller"), smaller="killed")
    assert observations("cpu", str(torch.__version__)) == []


def test_an_observation_that_cannot_be_kept_is_a_warning(tmp_path: Path, base: ModelEntry, edgepeft_home: Path) -> None:
    (edgepeft_home / "cache" / "calibration.json").mkdir(parents=True)
    events = train(tiny_run(tmp_path, base))
    assert "could not be kept for the next plans" in of_type(events, Warned)[-1].message
    assert isinstance(events[-1], Finished)
