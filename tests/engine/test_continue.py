"""Training that starts from another adapter: where it begins, and that it resumes without that adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from edgepeft.errors import BadInput
from edgepeft.library.parent import find_parent, lineage
from edgepeft.library.store import list_adapters, remove, resolve_adapter
from edgepeft.methods import LoraConfig
from edgepeft.models.store import ModelEntry
from edgepeft.runs.control import request
from edgepeft.runs.events import Evaluated, Finished, Started, StepDone
from edgepeft.runs.layout import RunFolder
from edgepeft.spec import Optimizer
from training_runs import of_type, tiny_base, tiny_run, train


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture
def base(tmp_path: Path) -> ModelEntry:
    return tiny_base(tmp_path)


@pytest.fixture
def parent_loss(tmp_path: Path, base: ModelEntry) -> float:
    """The held-out loss of tiny@v1, which is trained."""
    method = LoraConfig(rank=4, alpha=8.0, dropout=0.1, rank_stabilised=True)
    (finished,) = of_type(train(tiny_run(tmp_path, base, method=method)), Finished)
    assert finished.published == "tiny@v1"
    assert finished.eval_loss is not None
    return finished.eval_loss


def continued(folder: Path, base: ModelEntry, name: str = "tiny", **changes: Any) -> RunFolder:
    parent = find_parent("tiny@v1", base)
    return tiny_run(folder, base, name, method=parent.method, parent=parent.ref, **changes)


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def test_it_starts_at_the_held_out_loss_of_its_parent(tmp_path: Path, base: ModelEntry, parent_loss: float) -> None:
    # A rate that moves no float32 value: what is evaluated is the start.
    run = continued(tmp_path, base, optimizer=Optimizer(learning_rate=1e-30), max_steps=1)
    # The first evaluation is of the bare base.
    _, found = of_type(train(run), Evaluated)
    assert found.loss == parent_loss
    fresh = tiny_run(tmp_path, base, "fresh", optimizer=Optimizer(learning_rate=1e-30), max_steps=1)
    base_alone, _ = of_type(train(fresh), Evaluated)
    assert base_alone.loss > 1.2 * parent_loss
    for name, value in weights(run).items():
        assert torch.equal(value, load_file(resolve_adapter("tiny@v1").weights)[name]), name


def test_it_becomes_the_next_version_with_its_lineage(tmp_path: Path, base: ModelEntry, parent_loss: float) -> None:
    (finished,) = of_type(train(continued(tmp_path, base)), Finished)
    assert finished.published == "tiny@v2"
    assert finished.eval_loss is not None
    assert finished.eval_loss < parent_loss
    card = resolve_adapter("tiny@v2").card
    assert card is not None
    assert card.parent == "tiny@v1"
    assert lineage(card) == ["tiny@v1"]
    (other,) = of_type(train(continued(tmp_path, base, "other")), Finished)
    assert other.published == "other@v1"


def test_it_resumes_to_the_bit_without_the_library(tmp_path: Path, base: ModelEntry, parent_loss: float) -> None:
    whole, parts, early = (continued(tmp_path, base, name, checkpoint_steps=2) for name in ("whole", "parts", "early"))
    train(whole)

    def stop_at_3(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            request(parts, "stop")

    train(parts, stop_at_3)

    class Killed(Exception):
        pass

    def die(event: Any) -> None:
        if isinstance(event, StepDone):
            raise Killed

    # Before the first checkpoint: the start values are read once more.
    with pytest.raises(Killed):
        train(early, die)
    assert not list(early.checkpoints.glob("step-*"))
    remove("tiny")
    assert not [adapter for adapter in list_adapters() if adapter.name == "tiny"]
    for run, step in ((parts, 3), (early, 0)):
        assert of_type(train(run), Started)[0].step == step
        expected = weights(whole)
        assert weights(run).keys() == expected.keys()
        for name, value in weights(run).items():
            assert torch.equal(value, expected[name]), name


def test_start_values_that_changed_are_refused(tmp_path: Path, base: ModelEntry, parent_loss: float) -> None:
    run = continued(tmp_path, base)
    path = run.start / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInput, match="these are not the values of tiny@v1"):
        train(run)
    path.unlink()
    with pytest.raises(BadInput, match="are gone"):
        train(run)


def test_a_checkpoint_of_another_parent_is_refused(tmp_path: Path, base: ModelEntry, parent_loss: float) -> None:
    run = continued(tmp_path, base, checkpoint_steps=1, max_steps=2)
    train(run)
    run.plan_file.write_text(run.plan_file.read_text().replace(find_parent("tiny@v1", base).ref.sha256, "sha256:00"))
    with pytest.raises(BadInput, match=r"differs in parent\.sha256"):
        train(run)
