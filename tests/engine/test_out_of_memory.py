"""Memory that runs out wherever it may: the same samples are learned from once, in a smaller layout."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from edgepeft.engine.training import step as step_module
from edgepeft.engine.training.loss import summed_loss
from edgepeft.engine.training.update import AdapterUpdate
from edgepeft.errors import DoesNotFit, OutOfMemory
from edgepeft.library.store import resolve_adapter
from edgepeft.methods import LoraConfig
from edgepeft.models.store import ModelEntry
from edgepeft.runs.control import request
from edgepeft.runs.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    Finished,
    MemoryMeasured,
    OutOfMemoryHit,
    PhaseChanged,
    Recovered,
    StepDone,
)
from edgepeft.runs.layout import RunFolder
from out_of_memory import Allocations, allocator_error, fail_at
from training_runs import of_type, tiny_base, tiny_run, train

FIRST_STEP = "the first step"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture
def base(tmp_path: Path) -> ModelEntry:
    return tiny_base(tmp_path)


@pytest.fixture
def allocations() -> Iterator[Allocations]:
    mode = Allocations()
    yield mode
    mode.stop()


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def difference(one: RunFolder, other: RunFolder) -> float:
    values = weights(other)
    return max(float((value - values[name]).abs().max()) for name, value in weights(one).items())


def learned(events: list[Event]) -> list[tuple[int, float, int, int]]:
    """What must not depend on where memory ran out."""
    return [(done.step, done.learning_rate, done.tokens, done.trained_tokens) for done in of_type(events, StepDone)]


class Calm:
    """Undisturbed runs, one for each layout that a disturbed one came down to."""

    def __init__(self, folder: Path, base: ModelEntry, **options: Any) -> None:
        self._folder, self._base, self._options = folder, base, options
        self._runs: dict[tuple[int, str, int], tuple[RunFolder, list[Event]]] = {}

    def like(self, run: RunFolder) -> tuple[RunFolder, list[Event]]:
        card = resolve_adapter(run.id.rpartition("-")[0]).card
        assert card is not None
        layout = card.layout
        key = (layout.micro_batch_tokens, layout.checkpointing, layout.loss_chunk_tokens)
        if key not in self._runs:
            calm = tiny_run(
                self._folder,
                self._base,
                f"calm-{len(self._runs)}",
                **self._options | {"micro_batch_tokens": key[0], "checkpointing": key[1], "loss_chunk_tokens": key[2]},
            )
            self._runs[key] = calm, train(calm)
        return self._runs[key]


@pytest.mark.parametrize("checkpointing", ["none", "layer"])
def test_at_any_allocation_of_the_first_step_the_result_is_that_of_the_smaller_layout(
    tmp_path: Path, base: ModelEntry, allocations: Allocations, checkpointing: str
) -> None:
    options = {"max_steps": 2, "checkpointing": checkpointing}
    train(tiny_run(tmp_path, base, "counted", **options), allocations.while_in(FIRST_STEP))
    total = allocations.count
    assert total > 400
    calm, caps = Calm(tmp_path, base, **options), set()
    for at in range(0, 3 * total // 4, total // 10):
        mode = Allocations(at)
        run = tiny_run(tmp_path, base, f"hit-{at}", **options)
        events = train(run, mode.while_in(FIRST_STEP))
        mode.stop()
        assert mode.failed
        (hit,) = of_type(events, OutOfMemoryHit)
        (recovered,) = of_type(events, Recovered)
        assert (hit.phase, recovered.cause) == ("train step", "step")
        assert recovered.micro_batch_tokens <= hit.micro_batch_tokens / 2 or recovered.checkpointing == "layer"
        # The checkpoint with the new layout is written before the step is tried again.
        saved = of_type(events, CheckpointSaved)[0].step
        assert saved == hit.step - 1
        undisturbed, calm_events = calm.like(run)
        assert learned(events) == learned(calm_events)
        if hit.step == 1:
            assert difference(run, undisturbed) == 0.0, at
        else:
            assert difference(run, undisturbed) <= 1e-6, at
        caps.add(recovered.micro_batch_tokens)
    assert len(caps) > 1


def test_in_clipping_or_the_optimizer_no_step_is_applied_twice(
    tmp_path: Path, base: ModelEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_steps": 3}
    calm = tiny_run(tmp_path, base, "calm", **options)
    calm_events = train(calm)
    real = {name: getattr(AdapterUpdate, name) for name in ("clip", "apply")}

    def failing(name: str, step: int, at: int) -> Callable[[AdapterUpdate], Any]:
        calls = 0

        def call(update: AdapterUpdate) -> Any:
            nonlocal calls
            calls += 1
            if calls != step:
                return real[name](update)
            with Allocations(at, least_bytes=0):
                return real[name](update)

        return call

    for name, step, at in (("clip", 1, 0), ("clip", 3, 1), ("apply", 1, 0), ("apply", 3, 0)):
        with monkeypatch.context() as patch:
            patch.setattr(AdapterUpdate, name, failing(name, step, at))
            run = tiny_run(tmp_path, base, f"{name}-{step}", **options)
            events = train(run)
        assert [hit.step for hit in of_type(events, OutOfMemoryHit)] == [step]
        assert learned(events) == learned(calm_events)
        assert difference(run, calm) <= 1e-6


def test_in_the_probe_nothing_has_been_learned_and_the_layout_shrinks(
    tmp_path: Path, base: ModelEntry, allocations: Allocations
) -> None:
    options = {"max_steps": 2}
    train(tiny_run(tmp_path, base, "counted", **options), allocations.while_in("trying the largest", "evaluate"))
    total, calm = allocations.count, Calm(tmp_path, base, **options)
    phases = set()
    for at in range(0, total, total // 8):
        mode = Allocations(at)
        run = tiny_run(tmp_path, base, f"hit-{at}", **options)
        events = train(run, mode.while_in("trying the largest", "evaluate"))
        mode.stop()
        assert mode.failed
        (hit,) = of_type(events, OutOfMemoryHit)
        (recovered,) = of_type(events, Recovered)
        undisturbed, calm_events = calm.like(run)
        assert learned(events) == learned(calm_events)
        assert difference(run, undisturbed) == 0.0, at
        phases.add((hit.phase, recovered.cause))
    assert phases == {("probe", "probe"), ("evaluation", "evaluation")}


def test_an_evaluation_adapts_alone_and_remembers_it(tmp_path: Path, base: ModelEntry) -> None:
    options = {"max_steps": 4, "eval_every_steps": 2, "micro_batch_tokens": 400}
    calm = tiny_run(tmp_path, base, "calm", **options)
    calm_events = train(calm)
    mode = Allocations(at=60)
    run = tiny_run(tmp_path, base, "hit", **options)
    entered = mode.while_in("")

    def in_evaluations(event: Event) -> None:
        if not isinstance(event, PhaseChanged) or event.name in ("evaluate", "save"):
            entered(event)

    events = train(run, in_evaluations)
    assert mode.failed
    (hit,) = of_type(events, OutOfMemoryHit)
    (recovered,) = of_type(events, Recovered)
    assert (hit.phase, hit.step, recovered.cause) == ("evaluation", 0, "evaluation")
    assert [found.loss for found in of_type(events, Evaluated)] == pytest.approx(
        [found.loss for found in of_type(calm_events, Evaluated)], rel=1e-5
    )
    assert learned(events) == learned(calm_events)
    assert difference(run, calm) == 0.0
    card = resolve_adapter("hit@v1").card
    assert card is not None
    assert card.layout.micro_batch_tokens == 400


def test_the_gradient_of_a_first_micro_batch_does_not_survive_the_failure_of_the_second(
    tmp_path: Path, base: ModelEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_step(event: Event) -> None:
        if isinstance(event, PhaseChanged) and event.detail == FIRST_STEP:
            fail_at(monkeypatch, {1}, lambda: torch.OutOfMemoryError("CUDA out of memory."))

    calm = tiny_run(tmp_path, base, "calm")
    train(calm)
    run = tiny_run(tmp_path, base, "hit")
    events = train(run, first_step)
    (hit,) = of_type(events, OutOfMemoryHit)
    assert (hit.step, hit.phase, hit.message) == (1, "train step", "CUDA out of memory.")
    assert [saved.step for saved in of_type(events, CheckpointSaved)] == [0, 6]
    assert difference(run, calm) <= 1e-4


def test_any_other_error_is_none(tmp_path: Path, base: ModelEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, {0}, lambda: RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        train(tiny_run(tmp_path, base))


def test_without_a_smaller_layout_it_says_what_would_help(
    tmp_path: Path, base: ModelEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, set(range(1000)))
    events: list[Event] = []
    with pytest.raises(OutOfMemory, match=r"--max-seq-len \d+, with a rank smaller than 4, or a base in nf4"):
        train(tiny_run(tmp_path, base, checkpointing="none"), events.append)
    # The whole ladder, before a step was done: fewer samples, checkpointing; chunks are smallest already.
    assert {hit.phase for hit in of_type(events, OutOfMemoryHit)} == {"probe"}
    assert of_type(events, Recovered)[-1].checkpointing == "layer"
    assert not of_type(events, StepDone)


def peak(events: list[Event]) -> int:
    return of_type(events, Finished)[0].measured_peak_bytes


def test_a_budget_is_kept_and_changes_nothing_that_is_learned(tmp_path: Path, base: ModelEntry) -> None:
    options = {"checkpointing": "none", "micro_batch_tokens": 400, "eval_every_steps": 3}
    free = tiny_run(tmp_path, base, "free", **options)
    free_events = train(free)
    whole = peak(free_events)
    for share in (0.8, 0.6, 0.5):
        run = tiny_run(tmp_path, base, f"within-{share}", **options, budget_bytes=int(share * whole))
        events = train(run)
        measured = [peak(events), *(found.peak_bytes for found in of_type(events, MemoryMeasured))]
        assert max(measured) <= share * whole
        # It ran out in the trial before the first step, and then never again.
        assert {hit.phase for hit in of_type(events, OutOfMemoryHit)} <= {"probe", "evaluation"}
        assert any(found.cause == "probe" for found in of_type(events, Recovered))
        assert learned(events) == learned(free_events)
        assert difference(run, free) <= 1e-4


def test_a_resumed_run_keeps_within_what_it_needed_before(tmp_path: Path, base: ModelEntry) -> None:
    options = {"checkpointing": "none", "micro_batch_tokens": 400, "method": LoraConfig(rank=32)}
    budget = peak(train(tiny_run(tmp_path, base, "free", **options)))
    run = tiny_run(tmp_path, base, "within", **options, budget_bytes=budget)

    def stop(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 2:
            request(run, "stop")

    train(run, stop)
    events = train(run)
    assert not of_type(events, OutOfMemoryHit)
    assert peak(events) == budget


def test_a_budget_below_the_base_is_refused_with_what_would_help(tmp_path: Path, base: ModelEntry) -> None:
    run = tiny_run(tmp_path, base, budget_bytes=base.weights_bytes // 2)
    with pytest.raises(DoesNotFit, match=r"tiny-model alone, in fp32, needs more than the \d+ KiB of the run's budget"):
        train(run)


def test_a_budget_that_leaves_no_room_for_the_optimizer_says_so(tmp_path: Path, base: ModelEntry) -> None:
    load = of_type(train(tiny_run(tmp_path, base, "measured", max_steps=1)), MemoryMeasured)[0]
    with pytest.raises(OutOfMemory, match="optimizer's state of"):
        train(tiny_run(tmp_path, base, "tight", budget_bytes=load.peak_bytes))


def test_after_a_kill_the_next_worker_begins_smaller(tmp_path: Path, base: ModelEntry) -> None:
    calm = tiny_run(tmp_path, base, "calm", checkpoint_steps=2)
    train(calm)
    run = tiny_run(tmp_path, base, "killed", checkpoint_steps=2)

    def die(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, die)
    events = train(run, smaller="killed")
    (recovered,) = of_type(events, Recovered)
    assert (recovered.cause, recovered.step) == ("killed", 3)
    assert recovered.micro_batch_tokens <= 80
    assert of_type(events, CheckpointSaved)[0].step == 2
    assert [done.step for done in of_type(events, StepDone)] == [3, 4, 5, 6]
    assert difference(run, calm) <= 1e-4


def test_no_smaller_layout_left_is_told_and_the_run_goes_on(tmp_path: Path, base: ModelEntry) -> None:
    run = tiny_run(tmp_path, base, micro_batch_tokens=1, loss_chunk_tokens=16, max_steps=1)
    events = train(run, smaller="killed")
    assert not of_type(events, Recovered)
    assert of_type(events, Finished)


def test_a_failing_micro_batch_leaves_nothing_alive(
    tmp_path: Path, base: ModelEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing: list[Any] = []
    alive: list[bool] = []

    def fails_first(hidden: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if failing:
            return summed_loss(hidden, *arguments)
        failing.append(weakref.ref(hidden.untyped_storage()))
        raise allocator_error()

    def look(event: Event) -> None:
        if isinstance(event, Recovered):
            alive.append(failing[0]() is not None)

    monkeypatch.setattr(step_module, "summed_loss", fails_first)
    train(tiny_run(tmp_path, base, max_steps=1), look)
    assert alive == [False]
