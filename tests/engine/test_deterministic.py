"""`--deterministic`: for a card it asks torch for reproducible kernels, on the CPU it changes nothing at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from edgepeft.engine.training.device import be_deterministic
from edgepeft.errors import UsageError
from edgepeft.plan.build import build
from edgepeft.plan.pins import check_pins
from training_runs import tiny_base, tiny_run, train


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    fill, benchmark = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.backends.cudnn.benchmark = benchmark


def test_for_a_card_it_is_an_error_not_a_warning() -> None:
    be_deterministic(torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()
    be_deterministic(torch.device("cuda"))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


def test_the_plan_carries_it_in_the_layout(tiny_model: Path, alpaca_file: Path) -> None:
    typed = {"gpu": "cpu", "budget": "1GiB", "rank": 4}
    plain, asked = (build(str(tiny_model), alpaca_file, typed | more) for more in ({}, {"deterministic": True}))
    assert asked.spec.layout.deterministic
    assert asked.spec.recipe.digest() == plain.spec.recipe.digest()
    assert asked.memory == plain.memory
    assert [choice.value for choice in asked.choices if choice.what == "deterministic"] == ["yes"]
    assert not any(choice.what == "deterministic" for choice in plain.choices)
    with pytest.raises(UsageError, match="--deterministic"):
        check_pins({"deterministic": "yes"})


def test_on_the_cpu_nothing_else_is_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    base = tiny_base(tmp_path)
    plain, asked = tiny_run(tmp_path, base, "plain"), tiny_run(tmp_path, base, "asked", deterministic=True)
    train(plain)
    train(asked)
    name = "adapter_model.safetensors"
    assert (plain.adapter / name).read_bytes() == (asked.adapter / name).read_bytes()
