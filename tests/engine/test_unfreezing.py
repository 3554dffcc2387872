"""Progressive unfreezing in the engine: who gets a gradient and a state when, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from edgepeft.engine.methods import attach, set_active
from edgepeft.engine.model.load import load_model
from edgepeft.engine.training import loop
from edgepeft.engine.training.unfreezing import Unfreezing
from edgepeft.engine.training.update import AdapterUpdate
from edgepeft.library.store import resolve_adapter
from edgepeft.methods import FullConfig, LoraConfig, id_of
from edgepeft.methods.bottleneck import BottleneckConfig
from edgepeft.methods.compacter import CompacterConfig
from edgepeft.methods.norm import NormConfig
from edgepeft.methods.prefix import PrefixConfig
from edgepeft.models.store import ModelEntry
from edgepeft.runs.control import request
from edgepeft.runs.events import CheckpointSaved, Event, Finished, MemoryMeasured, OutOfMemoryHit, Started, StepDone
from edgepeft.runs.layout import RunFolder
from edgepeft.spec import Optimizer, Unfreeze
from out_of_memory import allocator_error
from plain_accelerator import Accelerator
from training_runs import of_type, tiny_base, tiny_run, train

CPU = torch.device("cpu")
LAYERS = 3
EVERY_TWO = Unfreeze(every_steps=2)
"""Of six steps the layers 2, 1 and 0 train from step 0, 2 and 4 on."""


@pytest.fixture
def base(tmp_path: Path) -> ModelEntry:
    return tiny_base(tmp_path, num_hidden_layers=LAYERS)


def layer_of(name: str) -> int | None:
    _, mark, rest = name.partition("model.layers.")
    return int(rest.partition(".")[0]) if mark else None


def stop_after(run: RunFolder, step: int) -> Any:
    def hook(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            request(run, "stop")

    return hook


def states_at(run: RunFolder, step: int) -> dict[int | None, set[float]]:
    """Layer → how many steps the states of its tensors have seen, in the checkpoint of a step."""
    found: dict[int | None, set[float]] = {}
    for name, value in load_file(run.checkpoints / f"step-{step}" / "optimizer.safetensors").items():
        if name.endswith("/step"):
            found.setdefault(layer_of(name), set()).add(float(value))
    return found


CONFIGS = (
    LoraConfig(rank=2),
    BottleneckConfig(reduction=8),
    CompacterConfig(reduction=8),
    NormConfig(),
    FullConfig(),
    PrefixConfig(3),
)


@pytest.mark.parametrize("config", CONFIGS, ids=id_of)
def test_layers_train_from_the_top_and_the_rest_always(base: ModelEntry, config: Any) -> None:
    loaded = load_model(base, precision="fp32", compute_dtype="fp32", device=CPU)
    adapter = attach(loaded, "a", config, seed=1)
    set_active(loaded, [("a", 1.0)])
    named = adapter.named_parameters()
    others = {name for name in named if layer_of(name) is None}
    assert bool(others) == isinstance(config, CompacterConfig | NormConfig | FullConfig)
    with torch.no_grad():
        for parameter in named.values():
            parameter += 0.1 * torch.randn(parameter.shape)
    ids = torch.arange(12)[None]
    unfreezing = Unfreezing(loaded, adapter, EVERY_TWO, 6)

    def gradients() -> dict[str, torch.Tensor]:
        for parameter in named.values():
            parameter.grad = None
        loaded.model(ids).logits.square().mean().backward()
        return {name: value.grad for name, value in named.items() if value.grad is not None}

    whole = gradients()
    assert whole.keys() == named.keys()
    for step, lowest in ((0, 2), (1, 2), (2, 1), (3, 1), (4, 0), (5, 0), (0, 2)):
        unfreezing.begin_step(step)
        found = gradients()
        assert found.keys() == {name for name in named if (number := layer_of(name)) is None or number >= lowest}
        assert all(torch.equal(value, whole[name]) for name, value in found.items())
    unfreezing.train_all()
    assert gradients().keys() == named.keys()
    Unfreezing(loaded, adapter, None, 6).begin_step(0)
    assert gradients().keys() == named.keys()


def test_backward_ends_at_the_lowest_layer_that_trains(base: ModelEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(base, precision="fp32", compute_dtype="fp32", device=CPU)
    adapter = attach(loaded, "a", LoraConfig(rank=2), seed=1)
    set_active(loaded, [("a", 1.0)])
    asked: list[str] = []
    for name, linear in loaded.linears().items():
        weight = linear.weight_source
        real = weight.matmul_transposed

        def count(g: torch.Tensor, name: str = name, real: Any = real) -> torch.Tensor:
            asked.append(name)
            out: torch.Tensor = real(g)
            return out

        monkeypatch.setattr(weight, "matmul_transposed", count)
    Unfreezing(loaded, adapter, EVERY_TWO, 6).begin_step(2)
    loaded.model(torch.arange(12)[None]).logits.sum().backward()
    assert {layer_of(name) for name in asked} == {1, 2}


@pytest.mark.parametrize(
    ("optimizer", "checkpointing"), [("adamw", "layer"), ("adamw", "none"), ("adamw8bit", "layer")]
)
def test_a_run_resumes_to_the_bit_across_unfreezings(
    tmp_path: Path, base: ModelEntry, optimizer: Any, checkpointing: Any
) -> None:
    options = {
        "unfreeze": EVERY_TWO,
        "checkpoint_steps": 1,
        "keep_checkpoints": 9,
        "checkpointing": checkpointing,
        "optimizer": Optimizer(optimizer, learning_rate=5e-3, weight_decay=0.1),
    }
    whole = tiny_run(tmp_path, base, "whole", **options)
    steps = of_type(train(whole), StepDone)
    assert all(step.grad_norm > 0 for step in steps)
    # Stopped where the next step unfreezes a layer, and just behind such steps.
    for name, stops in (("two", (2,)), ("often", (1, 3))):
        parts = tiny_run(tmp_path, base, name, **options)
        for stop in stops:
            train(parts, stop_after(parts, stop))
        events = train(parts)
        assert of_type(events, Started)[0].step == stops[-1]
        first, second = (resolve_adapter(f"{run}@v1").weights.read_bytes() for run in ("whole", name))
        assert first == second
        if optimizer == "adamw":
            for step in of_type(events, CheckpointSaved):
                assert states_at(parts, step.step) == states_at(whole, step.step)


@pytest.mark.parametrize("method", [NormConfig(), FullConfig()], ids=id_of)
def test_state_and_values_follow_the_schedule(tmp_path: Path, base: ModelEntry, method: Any) -> None:
    run = tiny_run(
        tmp_path, base, unfreeze=EVERY_TWO, method=method, checkpoint_steps=1, keep_checkpoints=9
    )  # fmt: skip
    train(run)
    assert states_at(run, 1) == {None: {1}, 2: {1}}
    assert states_at(run, 2) == {None: {2}, 2: {2}}
    assert states_at(run, 3) == {None: {3}, 2: {3}, 1: {1}}
    assert states_at(run, 6) == {None: {6}, 2: {6}, 1: {4}, 0: {2}}
    values = {step: load_file(run.checkpoints / f"step-{step}" / "adapter.safetensors") for step in (1, 2, 4, 5)}
    for name, value in values[1].items():
        layer = layer_of(name)
        assert torch.equal(value, values[2][name]) == (layer in (0, 1)), name
        assert torch.equal(value, values[4][name]) == (layer == 0), name
        assert not torch.equal(value, values[5][name]), name


def test_the_measured_peak_is_that_of_the_end(tmp_path: Path, base: ModelEntry) -> None:
    """It is there before the first step, when the largest micro-batch is tried, and no later step exceeds it."""
    plain = tiny_run(tmp_path, base, "plain", checkpointing="none")
    slow = tiny_run(tmp_path, base, "slow", checkpointing="none", unfreeze=EVERY_TWO)
    one, other = train(plain), train(slow)
    peaks = [of_type(events, Finished)[0].measured_peak_bytes for events in (one, other)]
    assert peaks[0] == peaks[1]
    assert max(event.peak_bytes for event in of_type(other, MemoryMeasured) if event.step == 0) == peaks[1]
    # Between steps a run holds less while layers wait: their moments are not there yet.
    live = [[step.live_bytes for step in of_type(events, StepDone)] for events in (one, other)]
    assert live[0][-1] == live[1][-1]
    assert live[1] == sorted(live[1])
    assert live[1][0] < live[0][0]


def test_memory_that_runs_out_while_a_layer_is_unfrozen_shrinks_the_layout(
    tmp_path: Path, base: ModelEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = loop.AdapterUpdate.create_state, [0]

    def create_state(update: Any) -> None:
        calls[0] += 1
        # Once in preparation and once a step: this is the third step, in which a layer joins.
        if calls[0] == 4:
            raise allocator_error()
        real(update)

    plain = tiny_run(tmp_path, base, "plain", unfreeze=EVERY_TWO)
    train(plain)
    monkeypatch.setattr(loop.AdapterUpdate, "create_state", create_state)
    run = tiny_run(tmp_path, base, "tight", unfreeze=EVERY_TWO)
    events = train(run)
    assert [event.step for event in of_type(events, OutOfMemoryHit)] == [3]
    assert len(of_type(events, StepDone)) == 6
    one, other = (load_file(resolve_adapter(f"{name}@v1").weights) for name in ("plain", "tight"))
    assert all(torch.allclose(value, other[name], atol=1e-4) for name, value in one.items())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_states_are_made_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch, optimizer: Any) -> None:
    parameters = {f"p{n}": nn.Parameter(torch.randn(70, 70)) for n in range(3)}
    update = AdapterUpdate(parameters, Optimizer(optimizer), Accelerator(scaled=False))  # type: ignore[arg-type]
    real, calls = torch.zeros_like, [0]

    def zeros_like(*arguments: Any, **options: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 4:
            raise allocator_error()
        out: torch.Tensor = real(*arguments, **options)
        return out

    parameters["p2"].requires_grad_(False)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros_like", zeros_like)
        with pytest.raises(RuntimeError):
            update.create_state()
    assert {name.partition("/")[0] for name in update.tensors()} == {"p0"}
    update.create_state()
    kinds = {name: sorted(key for key in update.tensors() if key.startswith(name)) for name in parameters}
    assert len(kinds["p0"]) == len(kinds["p1"]) > 2
    assert not kinds["p2"]
    parameters["p1"].requires_grad_(False)
    update.drop_idle_state()
    assert {name.partition("/")[0] for name in update.tensors()} == {"p0"}
