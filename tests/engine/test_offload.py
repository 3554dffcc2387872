"""Offloaded inputs: not a bit differs, they leave the card in time, and predictions know how many are on it."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))

from accuracy.closed_form import compare, draw

from edgepeft.engine.methods import attach, set_active
from edgepeft.engine.model.load import load_model
from edgepeft.engine.simulate.dry_run import dry_run
from edgepeft.engine.training import offload
from edgepeft.engine.training.batches import Sample
from edgepeft.engine.training.memory import MemoryGauge
from edgepeft.engine.training.step import StepRunner
from edgepeft.memory.breakdown import Phase
from edgepeft.memory.chunks import in_token_steps
from edgepeft.memory.dry_run import DryRunRequest
from edgepeft.memory.estimate import estimate_training
from edgepeft.memory.target import CPU, Target
from edgepeft.memory.workload import Workload
from edgepeft.methods import LoraConfig
from edgepeft.models.config import read_shape
from edgepeft.models.store import ensure_model
from edgepeft.spec import Layout
from shapes import run_spec
from tiny import tiny_config, write_tiny_model

LAYERS = 5
CARD = Target("cuda", (8, 9))


class RamCarrier:
    """Copies within the RAM, and remembers what it brought; stands for a card's on a machine without one."""

    def __init__(self) -> None:
        self.sent = 0
        self.waited: list[int] = []
        self.brought: list[weakref.ref[Tensor]] = []
        self.most = 0

    def send(self, x: Tensor) -> tuple[Tensor, int]:
        self.sent += 1
        return x.clone(), self.sent

    def bring(self, host: Tensor) -> tuple[Tensor, int]:
        x = host.clone()
        self.brought.append(weakref.ref(x))
        self.most = max(self.most, sum(one() is not None for one in self.brought))
        return x, -len(self.brought)

    def wait(self, ticket: int) -> None:
        self.waited.append(ticket)


@pytest.fixture
def runner(tmp_path: Path) -> tuple[StepRunner, dict[str, torch.nn.Parameter]]:
    folder = write_tiny_model(tmp_path / "five", num_hidden_layers=LAYERS)
    loaded = load_model(ensure_model(str(folder)), precision="bf16", compute_dtype="bf16", device=torch.device("cpu"))
    adapter = attach(loaded, "a", LoraConfig(rank=4, alpha=8.0, dropout=0.1), seed=0)
    set_active(loaded, [("a", 1.0)])
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.named_parameters().values():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    recipe = run_spec(precision="bf16").recipe
    made = StepRunner(loaded, recipe, backward=lambda loss: loss.backward(), gauge=MemoryGauge(loaded.device))
    return made, adapter.named_parameters()


def samples() -> list[Sample]:
    torch.manual_seed(4)
    found = []
    for number, length in enumerate((11, 4, 19, 7)):
        ids = torch.randint(0, 256, (length + 1,), dtype=torch.int32).numpy()
        found.append(Sample(number, ids[:-1], torch.arange(length).numpy(), ids[1:].astype("int64")))
    return found


def gradients(runner: Any, mode: Any) -> tuple[float, dict[str, Tensor]]:
    steps, parameters = runner
    for parameter in parameters.values():
        parameter.grad = None
    sums = steps.train(samples(), Layout(micro_batch_tokens=24, checkpointing=mode, loss_chunk_tokens=8), 3)
    return sums.loss, {name: parameter.grad.clone() for name, parameter in parameters.items()}


def assert_same(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == expected[0]
    for name, value in expected[1].items():
        assert torch.equal(found[1][name], value), name


def test_not_a_bit_differs(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    carrier = RamCarrier()
    monkeypatch.setattr(offload, "carrier_of", lambda device: carrier)
    expected = gradients(runner, "layer")
    assert not carrier.sent
    assert_same(gradients(runner, "offload"), expected)
    micro_batches = 2
    assert carrier.sent == micro_batches * LAYERS
    # Each input is brought back once, one ahead, and none is left.
    assert len(carrier.brought) == micro_batches * LAYERS
    assert carrier.most == 2
    gc.collect()
    assert all(one() is None for one in carrier.brought)
    # The card's stream waits for every copy before its memory is used again, or what it brought is read.
    assert sorted(carrier.waited) == sorted([*range(1, carrier.sent + 1), *range(-len(carrier.brought), 0)])


def test_evaluation_sends_nothing(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    carrier = RamCarrier()
    monkeypatch.setattr(offload, "carrier_of", lambda device: carrier)
    steps, _ = runner
    layout = Layout(micro_batch_tokens=24, checkpointing="offload")
    steps.train(samples(), layout, 0)
    sent = carrier.sent
    steps.evaluate(samples(), layout)
    assert carrier.sent == sent


def test_on_the_cpu_it_is_layer(runner: Any) -> None:
    assert offload.carrier_of(torch.device("cpu")) is None
    assert_same(gradients(runner, "offload"), gradients(runner, "layer"))


def _without_slack(phase: Phase) -> int:
    return phase.total_bytes - phase.bytes_by_category.get("allocator slack", 0)


def _steps(mode: Any, target: Target, workload: Workload, *, full: bool = False) -> tuple[Phase, Phase]:
    """The train step as it is predicted, and as it is in the dry run."""
    config = tiny_config(num_hidden_layers=12, torch_dtype="bfloat16", max_position_embeddings=4096)
    spec = run_spec(precision="bf16", rank=4, checkpointing=mode, loss_chunk_tokens=16)
    predicted = estimate_training(spec, read_shape(config), workload, target)
    simulated = dry_run(DryRunRequest(spec, config, workload, target, full=full)).memory
    found = [next(phase for phase in memory.phases if phase.name == "train step") for memory in (predicted, simulated)]
    return found[0], found[1]


def test_inputs_of_the_layers_below_are_not_on_the_card() -> None:
    workload, size = Workload(3000, 3000, 100), in_token_steps(3000) * 64 * 2
    kept, moved = (_steps(mode, CARD, workload)[1] for mode in ("layer", "offload"))
    assert kept.place == "backward of layer 12"
    # Of the twelve inputs two are there in the last layer's backward: its own, which its norm keeps, and the one below.
    assert _without_slack(kept) - _without_slack(moved) == 10 * size


def test_the_closed_form_knows_it_on_a_card_and_on_the_cpu() -> None:
    for workload in (Workload(3000, 3000, 100), Workload(900, 300, 900, alone=True)):
        predicted, simulated = _steps("offload", CARD, workload)
        assert _without_slack(predicted) == pytest.approx(_without_slack(simulated), rel=0.001)
    on_cpu = [_steps(mode, CPU, Workload(900, 300, 900))[0] for mode in ("layer", "offload")]
    assert on_cpu[0] == on_cpu[1]


def test_few_layers_tell_what_all_of_them_reserve() -> None:
    workload = Workload(3000, 3000, 100)
    few, whole = (_steps("offload", CARD, workload, full=full)[1] for full in (False, True))
    assert few.bytes_by_category == pytest.approx(whole.bytes_by_category, rel=0.02)


def test_every_family_is_predicted_within_a_percent() -> None:
    cases = [case for case in draw(seed=5, count=14) if case.target.kind == "cuda"]
    assert len({case.config["model_type"] for case in cases}) > 6
    for case in cases:
        layout = msgspec.structs.replace(case.spec.layout, checkpointing="offload")
        moved = msgspec.structs.replace(case, spec=msgspec.structs.replace(case.spec, layout=layout))
        for row in compare(moved):
            assert abs(row["error"]) < 0.01, row
