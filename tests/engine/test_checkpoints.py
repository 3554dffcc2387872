"""Checkpoints come back bit for bit, damage is passed over, and nothing good is ever lost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from torch import nn

from edgepeft.engine.training import checkpoints
from edgepeft.engine.training.checkpoints import (
    RunPosition,
    optimizer_tensors,
    read_newest_checkpoint,
    restore_optimizer,
    write_checkpoint,
)
from edgepeft.errors import BadInput, DiskProblem
from edgepeft.methods import LoraConfig
from edgepeft.spec import BaseRef, DataRef, Layout, Optimizer, Recipe

RECIPE = Recipe(
    base=BaseRef(model="tiny", fingerprint="sha256:1", architecture="LlamaForCausalLM"),
    data=DataRef(path="/data.jsonl", fingerprint="sha256:2", format="alpaca"),
    method=LoraConfig(),
    precision="nf4",
    compute_dtype="bf16",
    max_seq_len=512,
    samples_per_step=8,
)


class Trained(NamedTuple):
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.AdamW

    def step(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()

    def values(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}


@pytest.fixture
def trained() -> Trained:
    torch.manual_seed(0)
    parameters = {"layer.0.A": nn.Parameter(torch.randn(4, 6)), "layer.0.B": nn.Parameter(torch.randn(6, 4))}
    found = Trained(parameters, torch.optim.AdamW(parameters.values(), lr=0.1, fused=True))
    found.step()
    return found


def save(root: Path, trained: Trained, step: int, recipe: Recipe = RECIPE, keep: int = 2) -> Path:
    position = RunPosition(step=step, layout=Layout(micro_batch_tokens=64), train_seconds=1.5, recent_losses=(2.0, 1.0))
    return write_checkpoint(
        root, position, recipe, trained.values(), optimizer_tensors(trained.optimizer, trained.parameters), keep=keep
    )


def read(root: Path, recipe: Recipe = RECIPE) -> tuple[Any, list[str]]:
    warnings: list[str] = []
    return read_newest_checkpoint(root, recipe, warnings.append), warnings


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_everything_comes_back_bit_for_bit(tmp_path: Path, trained: Trained) -> None:
    save(tmp_path, trained, 7)
    torch.manual_seed(5)
    trained.step()
    after = trained.values()
    found, warnings = read(tmp_path)
    assert not warnings
    assert found.position.step == 7
    assert found.position.recent_losses == (2.0, 1.0)
    parameters = {name: nn.Parameter(found.adapter[name].clone()) for name in trained.parameters}
    again = Trained(parameters, torch.optim.AdamW(parameters.values(), lr=0.1, fused=True))
    restore_optimizer(again.optimizer, parameters, found.optimizer)
    torch.manual_seed(5)
    again.step()
    for name, value in again.values().items():
        assert torch.equal(value, after[name])


def test_what_was_read_back_is_no_map_of_the_file(tmp_path: Path, trained: Trained) -> None:
    folder = save(tmp_path, trained, 7)
    found, _ = read(tmp_path)
    restore_optimizer(trained.optimizer, trained.parameters, found.optimizer)
    before = {name: value.clone() for name, value in optimizer_tensors(trained.optimizer, trained.parameters).items()}
    file = folder / "optimizer.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    for name, value in optimizer_tensors(trained.optimizer, trained.parameters).items():
        assert torch.equal(value, before[name])


def test_generators_come_back(tmp_path: Path, trained: Trained) -> None:
    torch.manual_seed(11)
    torch.rand(3)
    save(tmp_path, trained, 1)
    expected = torch.rand(4)
    torch.manual_seed(99)
    found, _ = read(tmp_path)
    found.restore_random_states()
    assert torch.equal(torch.rand(4), expected)


def test_the_newest_are_kept(tmp_path: Path, trained: Trained) -> None:
    for step in (2, 9, 10, 11):
        save(tmp_path, trained, step)
    assert names(tmp_path) == ["step-10", "step-11"]
    save(tmp_path, trained, 12, keep=1)
    assert names(tmp_path) == ["step-12"]


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "state", "empty-state", "folder"])
def test_a_damaged_one_is_told_and_passed_over(tmp_path: Path, trained: Trained, damage: str) -> None:
    save(tmp_path, trained, 3)
    folder = save(tmp_path, trained, 5)
    weights, state = folder / "adapter.safetensors", folder / "state.json"
    content = bytearray(weights.read_bytes())
    match damage:
        case "cut":
            weights.write_bytes(content[:-5])
        case "flip":
            content[-1] ^= 1
            weights.write_bytes(content)
        case "gone":
            (folder / "optimizer.safetensors").unlink()
        case "state":
            state.write_bytes(state.read_bytes()[:-9])
        case "empty-state":
            state.write_bytes(b"")
        case _:
            shutil.rmtree(folder)
            folder.mkdir()
    found, warnings = read(tmp_path)
    assert found.position.step == 3
    assert len(warnings) == 1
    assert "step-5 is damaged" in warnings[0]
    # Going on from step 3 replaces what is void.
    save(tmp_path, trained, 4)
    assert names(tmp_path) == ["step-3", "step-4"]


def test_the_same_step_again_replaces_it(tmp_path: Path, trained: Trained) -> None:
    save(tmp_path, trained, 3)
    trained.step()
    save(tmp_path, trained, 3)
    found, _ = read(tmp_path)
    assert torch.equal(found.adapter["layer.0.A"], trained.values()["layer.0.A"])
    assert names(tmp_path) == ["step-3"]


def test_remains_of_a_crash_are_neither_read_nor_kept(tmp_path: Path, trained: Trained) -> None:
    save(tmp_path, trained, 3)
    (tmp_path / ".step-4.draft").mkdir()
    (tmp_path / ".step-4.draft" / "adapter.safetensors").write_bytes(b"half")
    found, warnings = read(tmp_path)
    assert (found.position.step, warnings) == (3, [])
    save(tmp_path, trained, 4)
    assert names(tmp_path) == ["step-3", "step-4"]


def test_no_checkpoint_is_no_trouble(tmp_path: Path) -> None:
    assert read(tmp_path / "missing") == (None, [])


def test_another_recipe_is_refused_and_named(tmp_path: Path, trained: Trained) -> None:
    save(tmp_path, trained, 3)
    other = msgspec.structs.replace(RECIPE, seed=4, optimizer=Optimizer(learning_rate=1.0))
    with pytest.raises(BadInput, match=r"differs in optimizer\.learning_rate, seed"):
        read(tmp_path, other)


def test_a_full_disk_keeps_what_is_there(tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, trained, 3)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(DiskProblem, match="1000 B are free"):
            save(tmp_path, trained, 4)

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.os, "fsync", fail)
        with pytest.raises(DiskProblem, match="disk is full"):
            save(tmp_path, trained, 4)
    assert names(tmp_path) == ["step-3"]
    found, warnings = read(tmp_path)
    assert (found.position.step, warnings) == (3, [])


def test_before_the_first_step_there_is_no_optimizer_state(tmp_path: Path) -> None:
    parameters = {"A": nn.Parameter(torch.ones(2))}
    fresh = Trained(parameters, torch.optim.AdamW(parameters.values(), fused=True))
    save(tmp_path, fresh, 0)
    found, _ = read(tmp_path)
    assert found.optimizer == {}
