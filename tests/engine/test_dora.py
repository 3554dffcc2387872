"""DoRA beside what every method is tried for: PEFT's numbers, dropout, and when the lengths of rows are formed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from edgepeft.engine.methods import AttachedAdapter, attach, set_active
from edgepeft.engine.methods.dora import DoraUpdate
from edgepeft.engine.methods.dropout import current_samples, dropout_context
from edgepeft.engine.methods.files import read_adapter, save_adapter
from edgepeft.engine.model.load import LoadedModel, load_model
from edgepeft.engine.training.optimizer import make_optimizer
from edgepeft.errors import BadInput
from edgepeft.methods import LoraConfig
from edgepeft.models.store import ensure_model
from edgepeft.spec import Optimizer
from tiny import write_tiny_model

CPU = torch.device("cpu")
IDS = torch.randint(0, 250, (2, 19), generator=torch.Generator().manual_seed(5))
CONFIG = LoraConfig(rank=4, alpha=6.0, dora=True)


def load(folder: Path, precision: Any = "fp32", compute: Any = "fp32") -> LoadedModel:
    return load_model(ensure_model(str(folder)), precision=precision, compute_dtype=compute, device=CPU)


def move(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1


def logits(loaded: LoadedModel, *active: tuple[str, float]) -> Tensor:
    set_active(loaded, active)
    with torch.no_grad():
        out: Tensor = loaded.model(IDS).logits
    return out


def updates(adapter: AttachedAdapter) -> list[DoraUpdate]:
    found = [update for update in adapter.updates.values() if isinstance(update, DoraUpdate)]
    assert len(found) == len(adapter.updates)
    return found


@pytest.mark.parametrize("biased", [False, True], ids=["without biases", "with biases"])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2, "down_proj": 8}, "alpha_pattern": {"o_proj": 3}}],
    ids=["plain", "rank-stabilised", "patterns"],
)
def test_pefts_file_gives_pefts_logits_and_gradients_and_ours_loads_there(
    tmp_path: Path, biased: bool, options: dict[str, Any]
) -> None:
    folder = write_tiny_model(tmp_path / "model", biased=biased)
    settings = PeftLoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"],
        use_dora=True,
        **options,
    )
    settings.task_type = "CAUSAL_LM"
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), settings).eval()
    move(parameter for parameter in theirs.parameters() if parameter.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load(folder)
    adapter = read_adapter(tmp_path / "theirs", loaded, "t")
    set_active(loaded, [("t", 1.0)])
    outs = [model(input_ids=IDS, labels=IDS) for model in (theirs, loaded.model)]
    torch.testing.assert_close(outs[1].logits, outs[0].logits, rtol=1e-5, atol=1e-5)
    for out in outs:
        out.loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    own = adapter.named_parameters()
    assert len(own) == len(gradients) == 3 * 5 * 2
    for name, parameter in own.items():
        path, _, tensor = name.removesuffix(".weight").rpartition(".")
        wanted = gradients[f"base_model.model.{path}.{tensor}.default.weight"]
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-6)
    save_adapter(tmp_path / "ours", adapter, "tiny")
    fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    back = PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(back(IDS).logits, outs[0].logits.detach(), rtol=1e-5, atol=1e-5)


def test_a_file_with_lengths_and_without_use_dora_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    loaded = load(tiny_model)
    save_adapter(tmp_path, attach(loaded, "a", CONFIG, seed=0), "tiny")
    config = tmp_path / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"use_dora": False}))
    with pytest.raises(BadInput, match="lora_magnitude_vector fits no layer"):
        read_adapter(tmp_path, loaded, "b")
    save_adapter(tmp_path, attach(loaded, "c", LoraConfig(rank=4), seed=0), "tiny")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    with pytest.raises(BadInput, match="lora_magnitude_vector is missing"):
        read_adapter(tmp_path, loaded, "b")


@pytest.mark.parametrize(("precision", "compute"), [("fp32", "fp32"), ("nf4", "bf16")])
@pytest.mark.parametrize("biased", [False, True], ids=["without biases", "with biases"])
def test_dropout_is_pefts(tmp_path: Path, biased: bool, precision: Any, compute: Any) -> None:
    """What is dropped from the update's input is dropped from what the lengths multiply, too."""
    folder = write_tiny_model(tmp_path / "model", biased=biased)
    loaded = load(folder, precision, compute)
    adapter = attach(loaded, "a", LoraConfig(rank=4, alpha=6.0, dropout=0.4, dora=True), seed=1)
    move(adapter.named_parameters().values())
    set_active(loaded, [("a", 1.0)])
    path = "model.layers.0.self_attn.q_proj"
    linear, update = loaded.linears()[path], adapter.updates[path]
    assert isinstance(update, DoraUpdate)
    dtype = loaded.workspace.dtype
    generator = torch.Generator().manual_seed(3)
    x, g = (torch.randn(21, 64, generator=generator).to(dtype) for _ in range(2))
    found = x.clone().requires_grad_()
    with dropout_context(7, 3, [4, 9], [12, 9]):
        y = linear.alone(found)
        y.backward(g)
        mask = update._lora.mask(current_samples(), x).double()
    assert 0.2 < float((mask == 0).double().mean()) < 0.6
    weight = linear.weight_source.materialize(torch.empty(64, 64, dtype=dtype)).double()
    A, B, m, exact = (value.detach().double().requires_grad_() for value in (update.A, update.B, update.magnitude, x))
    whole = weight + 1.5 * B @ A
    factors = m / whole.norm(dim=1).detach()
    dropped = exact * mask
    expected = exact @ weight.t() + (factors - 1) * (dropped @ weight.t()) + factors * (dropped @ (1.5 * B @ A).t())
    if linear.bias is not None:
        expected = expected + linear.bias.double()
    expected.backward(g.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    pairs = ((y, expected), (found.grad, exact.grad), (update.A.grad, A.grad), (update.B.grad, B.grad))
    for one, other in (*pairs, (update.magnitude.grad, m.grad)):
        assert one is not None
        assert other is not None
        assert float((one.detach().double() - other.detach()).norm() / other.detach().norm()) < tolerance


def test_lengths_are_formed_once_after_each_change(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(tiny_model)
    adapter = attach(loaded, "a", CONFIG, seed=1)
    formed: list[int] = []
    exact = torch.sqrt
    monkeypatch.setattr(torch, "sqrt", lambda *given, **named: (formed.append(1), exact(*given, **named))[1])
    optimizer = make_optimizer(adapter.named_parameters(), Optimizer(learning_rate=1e-2))
    set_active(loaded, [("a", 1.0)])
    for step in range(1, 4):
        for _ in range(2):
            loaded.model(input_ids=IDS, labels=IDS).loss.backward()
        assert len(formed) == step * len(adapter.updates)
        optimizer.step()
    logits(loaded, ("a", 1.0))
    assert len(formed) == 4 * len(adapter.updates)
    logits(loaded, ("a", 1.0))
    assert len(formed) == 4 * len(adapter.updates)
    for update in updates(adapter):
        dense = update._weight.materialize(torch.empty(update._weight.shape))
        wanted = (dense + update.factor * update.B.detach() @ update.A.detach()).norm(dim=1)
        torch.testing.assert_close(update._lengths, wanted, rtol=1e-5, atol=1e-6)


def test_rows_of_zeros_stay_finite(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_tiny_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][5] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load(folder)
    base = logits(loaded)
    adapter = attach(loaded, "a", CONFIG, seed=1)
    assert torch.equal(logits(loaded, ("a", 1.0)), base)
    optimizer = make_optimizer(adapter.named_parameters(), Optimizer(learning_rate=1e-2))
    for _ in range(3):
        loaded.model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert all(bool(torch.isfinite(value).all()) for value in adapter.state_dict().values())
    assert bool(torch.isfinite(logits(loaded, ("a", 1.0))).all())
