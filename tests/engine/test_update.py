"""The optimizer's half of a step: the same numbers as torch's own AdamW, applied once whatever fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from edgepeft.engine.training.optimizer import make_optimizer
from edgepeft.engine.training.update import AdapterUpdate
from edgepeft.spec import Optimizer
from out_of_memory import Allocations, allocator_error
from plain_accelerator import Accelerator

SETTINGS = Optimizer(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.0)


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {f"p{n}": nn.Parameter(torch.randn(3, 4)) for n in range(3)}


def made(*, scaled: bool = False) -> AdapterUpdate:
    return AdapterUpdate(parameters(), SETTINGS, Accelerator(scaled=scaled))  # type: ignore[arg-type]


def learn(update: AdapterUpdate, step: int) -> None:
    loss = sum((parameter * (step + 1)).square().sum() for parameter in update.parameters.values())
    assert isinstance(loss, torch.Tensor)
    update.backward(loss)
    update.clip()


def values(update: AdapterUpdate) -> list[torch.Tensor]:
    return [value.detach().clone() for value in (*update.parameters.values(), *update.tensors().values())]


def test_states_that_are_made_early_are_those_that_adamw_makes() -> None:
    own, plain = made(), parameters()
    own.create_state()
    adamw = make_optimizer(plain, SETTINGS)
    for step in range(3):
        learn(own, step)
        own.apply()
        own.drop_gradients()
        adamw.zero_grad()
        sum((value * (step + 1)).square().sum() for value in plain.values()).backward()
        adamw.step()
    for name, value in plain.items():
        assert torch.equal(own.parameters[name], value)
        for key, state in adamw.state[value].items():
            assert torch.equal(own.tensors()[f"{name}/{key}"], state), key
            assert own.tensors()[f"{name}/{key}"].dtype == state.dtype


def test_making_states_again_keeps_what_is_there() -> None:
    update = made()
    update.create_state()
    learn(update, 0)
    update.apply()
    before = values(update)
    update.create_state()
    assert all(torch.equal(one, other) for one, other in zip(before, values(update), strict=True))


@pytest.mark.parametrize("scaled", [False, True])
def test_a_failure_before_the_change_changes_nothing(monkeypatch: pytest.MonkeyPatch, scaled: bool) -> None:
    update, calm = made(scaled=scaled), made(scaled=scaled)
    for one in (update, calm):
        one.create_state()
        learn(one, 0)
        one.apply()
        one.drop_gradients()
    before = values(update)
    learn(update, 1)

    def fails(*arguments: Any, **options: Any) -> None:
        raise allocator_error()

    with monkeypatch.context() as patch:
        # AdamW has counted its step when this is called.
        patch.setattr(torch, "_fused_adamw_", fails)
        with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
            update.apply()
    assert all(torch.equal(one, other) for one, other in zip(before, values(update), strict=True))
    update.start_anew()
    assert all(parameter.grad is None for parameter in update.parameters.values())
    for one in (update, calm):
        learn(one, 1)
        one.apply()
    assert all(torch.equal(one, other) for one, other in zip(values(calm), values(update), strict=True))


def test_a_failure_behind_the_change_is_not_one_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    update, calm = made(scaled=True), made(scaled=True)
    for one in (update, calm):
        one.create_state()
        learn(one, 0)
    calm.apply()

    def fails(*arguments: Any) -> None:
        raise allocator_error()

    with monkeypatch.context() as patch:
        patch.setattr(torch.amp.GradScaler, "update", fails)
        update.apply()
    assert all(torch.equal(one, other) for one, other in zip(values(calm), values(update), strict=True))
    update.drop_gradients()
    learn(update, 1)
    update.apply()


def test_clipping_can_be_tried_again() -> None:
    update, calm = made(scaled=True), made(scaled=True)
    learn(calm, 0)
    loss = sum(parameter.square().sum() for parameter in update.parameters.values())
    assert isinstance(loss, torch.Tensor)
    update.backward(loss)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"), Allocations(0, least_bytes=0):
        update.clip()
    update.start_anew()
    learn(update, 0)
    for parameter, expected in zip(update.parameters.values(), calm.parameters.values(), strict=True):
        assert parameter.grad is not None
        assert expected.grad is not None
        assert torch.equal(parameter.grad, expected.grad)


def test_another_error_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    update = made()
    learn(update, 0)
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *arguments, **options: [][0])
    with pytest.raises(IndexError):
        update.apply()
