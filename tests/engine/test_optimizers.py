"""LoRA+'s two rates and 8-bit states: the numbers of their references, the bytes that are predicted, exact resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from edgepeft.engine.ledger import LiveBytes
from edgepeft.engine.methods import attach
from edgepeft.engine.model.load import load_model
from edgepeft.engine.simulate.dry_run import dry_run
from edgepeft.engine.training.checkpoints import optimizer_tensors, restore_optimizer
from edgepeft.engine.training.optimizer import make_optimizer, set_rate
from edgepeft.engine.training.update import AdapterUpdate
from edgepeft.errors import OutOfMemory
from edgepeft.memory.breakdown import Breakdown
from edgepeft.memory.dry_run import DryRunRequest
from edgepeft.memory.estimate import estimate_training
from edgepeft.memory.optimizer import state_bytes
from edgepeft.memory.target import CPU, Target
from edgepeft.memory.workload import Workload
from edgepeft.methods import LoraConfig, method_of
from edgepeft.models.config import read_shape
from edgepeft.models.shape import ModelShape
from edgepeft.models.store import ensure_model
from edgepeft.runs.control import request
from edgepeft.runs.events import StepDone
from edgepeft.spec import Optimizer
from out_of_memory import allocator_error
from plain_accelerator import Accelerator
from shapes import run_spec
from tiny import tiny_config
from training_runs import of_type, tiny_base, tiny_run, train

PLUS = Optimizer(learning_rate=1e-2, weight_decay=0.1, lora_plus_ratio=8.0)
EIGHT = Optimizer(name="adamw8bit", learning_rate=1e-2, weight_decay=0.1)


def parameters() -> dict[str, nn.Parameter]:
    """Two small pairs, and one whose entries are enough for 8-bit states."""
    torch.manual_seed(0)
    shapes = {"q.lora_A.weight": (4, 64), "q.lora_B.weight": (48, 4), "up.lora_A.weight": (16, 300),
              "up.lora_B.weight": (257, 16)}  # fmt: skip
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def give_gradients(trained: dict[str, nn.Parameter], step: int) -> None:
    torch.manual_seed(100 + step)
    for parameter in trained.values():
        parameter.grad = torch.randn_like(parameter)


def test_lora_plus_is_adamw_with_a_larger_rate_for_b() -> None:
    trained, plain = parameters(), parameters()
    optimizer = make_optimizer(trained, PLUS)
    moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in plain.items()}
    for step in range(1, 4):
        rate = 1e-2 / step
        set_rate(optimizer, rate)
        give_gradients(trained, step)
        give_gradients(plain, step)
        optimizer.step()
        with torch.no_grad():
            for name, value in plain.items():
                own, gradient = rate * (8.0 if "lora_B" in name else 1.0), value.grad
                assert gradient is not None
                first, second = moments[name]
                first.mul_(0.9).add_(gradient, alpha=0.1)
                second.mul_(0.999).add_(gradient**2, alpha=0.001)
                value.mul_(1 - own * 0.1)
                value -= own * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    for name, value in plain.items():
        torch.testing.assert_close(trained[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_lora_plus_groups_as_peft_does(tiny_model: Path) -> None:
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model
    from peft.optimizers import create_loraplus_optimizer
    from transformers import AutoModelForCausalLM

    wrapped = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model), PeftLora(r=4, target_modules="all-linear")
    )
    theirs = create_loraplus_optimizer(wrapped, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8.0)
    rates = {id(value): group["lr"] for group in theirs.param_groups for value in group["params"]}
    expected = {
        name.removeprefix("base_model.model.").replace(".default", ""): rates[id(value)]
        for name, value in wrapped.named_parameters()
        if value.requires_grad
    }
    loaded = load_model(
        ensure_model(str(tiny_model)), precision="fp32", compute_dtype="fp32", device=torch.device("cpu")
    )
    named = attach(loaded, "a", LoraConfig(rank=4), 0).named_parameters()
    ours = make_optimizer(named, PLUS)
    own = {id(value): group["lr"] for group in ours.param_groups for value in group["params"]}
    assert {name: own[id(value)] for name, value in named.items()} == expected
    assert sorted(set(expected.values())) == [1e-2, 8e-2]


def test_a_ratio_of_one_is_one_group() -> None:
    assert len(make_optimizer(parameters(), Optimizer()).param_groups) == 1


def test_eight_bit_states_give_the_numbers_of_bitsandbytes() -> None:
    import bitsandbytes

    trained, plain = parameters(), parameters()
    ours = make_optimizer(trained, EIGHT)
    theirs = bitsandbytes.optim.AdamW8bit(list(plain.values()), lr=1e-2, weight_decay=0.1)
    for step in range(4):
        set_rate(ours, 1e-2 / (step + 1))
        for group in theirs.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        give_gradients(trained, step)
        give_gradients(plain, step)
        ours.step()
        theirs.step()
    for name, value in plain.items():
        assert torch.equal(trained[name], value), name
        state, other = ours.state[trained[name]], theirs.state[value]
        assert state["state1"].dtype == (torch.uint8 if "up" in name else torch.float32)
        assert all(torch.equal(state[key], other[key]) for key in state if key != "step")
        assert state["step"] == other["step"]


def test_eight_bit_states_are_stored_and_read_back_exactly(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    trained = parameters()
    optimizer = make_optimizer(trained, EIGHT)
    for step in range(2):
        give_gradients(trained, step)
        optimizer.step()
    again = {name: nn.Parameter(value.detach().clone()) for name, value in trained.items()}
    other = make_optimizer(again, EIGHT)
    save_file(optimizer_tensors(optimizer, trained), tmp_path / "o.safetensors")
    restore_optimizer(other, again, load_file(tmp_path / "o.safetensors"))
    for named, one in ((trained, optimizer), (again, other)):
        give_gradients(named, 2)
        one.step()
    for name, value in trained.items():
        assert torch.equal(value, again[name])


@pytest.mark.parametrize("settings", [PLUS, EIGHT], ids=["LoRA+", "8 bit"])
def test_memory_that_runs_out_half_way_ends_the_run(settings: Optimizer, monkeypatch: pytest.MonkeyPatch) -> None:
    update = AdapterUpdate(parameters(), settings, Accelerator())  # type: ignore[arg-type]
    update.create_state()
    give_gradients(update.parameters, 0)

    def fails(*arguments: Any, **options: Any) -> None:
        raise allocator_error()

    monkeypatch.setattr(torch, "_fused_adamw_", fails)
    monkeypatch.setattr(torch.ops.bitsandbytes, "optimizer_update_32bit", fails)
    with pytest.raises(OutOfMemory, match="middle of the optimizer's step"):
        update.apply()


def _sizes(config: Any, shape: ModelShape) -> list[int]:
    return method_of(config).trained(config, shape).sizes(shape.layers)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_states_have_the_bytes_that_are_predicted(tiny_model: Path, name: Any) -> None:
    entry = ensure_model(str(tiny_model))
    config = LoraConfig(rank=32)
    loaded = load_model(entry, precision="fp32", compute_dtype="fp32", device=torch.device("cpu"))
    named = attach(loaded, "a", config, 0).named_parameters()
    sizes = [value.numel() for value in named.values()]
    assert sorted(sizes) == sorted(_sizes(config, entry.shape))
    assert min(sizes) < 4096 <= max(sizes)
    update = AdapterUpdate(named, Optimizer(name=name), Accelerator())  # type: ignore[arg-type]
    update.create_state()
    held = update.tensors_by_category()["optimizer state"]
    assert sum(value.nbytes for value in held) == state_bytes(name, sizes)
    with LiveBytes(torch.device("cpu"), others=False) as ledger:
        other = AdapterUpdate(named, Optimizer(name=name), Accelerator())  # type: ignore[arg-type]
        other.create_state()
        assert ledger.live_bytes == state_bytes(name, sizes)


@pytest.mark.parametrize("target", [CPU, Target("cuda", (8, 9))], ids=lambda target: target.kind)
@pytest.mark.parametrize("rank", [4, 32])
def test_the_dry_run_counts_eight_bit_states_as_the_closed_form_does(rank: int, target: Target) -> None:
    spec = run_spec(rank=rank, precision="bf16")
    recipe = msgspec.structs.replace(spec.recipe, optimizer=EIGHT)
    spec = msgspec.structs.replace(spec, recipe=recipe)
    config, workload = tiny_config(num_hidden_layers=3), Workload(200, 100, 150)
    predicted = estimate_training(spec, read_shape(config), workload, target)
    simulated = dry_run(DryRunRequest(spec, config, workload, target)).memory
    expected = state_bytes("adamw8bit", _sizes(spec.recipe.method, read_shape(config)))
    for memory in (predicted, simulated):
        step = next(phase for phase in memory.phases if phase.name == "train step")
        assert step.bytes_by_category["optimizer state"] == expected
    assert _without_slack(predicted) == pytest.approx(_without_slack(simulated), rel=0.001)


def _without_slack(memory: Breakdown) -> int:
    step = next(phase for phase in memory.phases if phase.name == "train step")
    return step.total_bytes - step.bytes_by_category.get("allocator slack", 0)


@pytest.mark.parametrize("settings", [PLUS, EIGHT], ids=["LoRA+", "8 bit"])
def test_stop_and_resume_is_bit_identical(tmp_path: Path, settings: Optimizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    base = tiny_base(tmp_path)
    options: dict[str, Any] = {"method": LoraConfig(rank=32), "optimizer": settings, "checkpoint_steps": 2}
    whole, parts = (tiny_run(tmp_path, base, name, **options) for name in ("whole", "parts"))
    events = train(whole)

    def stop(event: object) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            request(parts, "stop")

    train(parts, stop)
    assert [done.step for done in of_type(train(parts), StepDone)] == [4, 5, 6]
    losses = [done.loss for done in of_type(events, StepDone)]
    assert losses[-1] < losses[0]
    one, other = (load_file(run.adapter / "adapter_model.safetensors") for run in (whole, parts))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
