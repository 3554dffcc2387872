"""The load-balancing loss of experts: transformers' objective for one sample, and the same result in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from edgepeft.engine.methods import attach, set_active
from edgepeft.engine.model.load import LoadedModel, load_model
from edgepeft.engine.simulate.dry_run import dry_run
from edgepeft.engine.training.balance import balance_of
from edgepeft.engine.training.batches import Sample
from edgepeft.engine.training.memory import MemoryGauge
from edgepeft.engine.training.step import StepRunner
from edgepeft.memory.dry_run import DryRunRequest
from edgepeft.memory.target import CPU
from edgepeft.memory.workload import Workload
from edgepeft.methods import LoraConfig
from edgepeft.models.store import ensure_model
from edgepeft.spec import Layout
from shapes import run_spec
from tiny import write_tokenizer

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 260,
    "max_position_embeddings": 256,
    "router_aux_loss_coef": 0.7,
    "pad_token_id": 0,
    "bos_token_id": 256,
    "eos_token_id": 258,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True},
}
WIDE = Layout(micro_batch_tokens=10**6, checkpointing="none", loss_chunk_tokens=16)


def write(folder: Path, kind: str, *, asked: bool = True) -> Path:
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **COMMON, **FAMILIES[kind], output_router_logits=asked)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def load(folder: Path) -> LoadedModel:
    return load_model(ensure_model(str(folder)), precision="fp32", compute_dtype="fp32", device=torch.device("cpu"))


class Setup:
    def __init__(self, folder: Path) -> None:
        self.loaded = load(folder)
        adapter = attach(self.loaded, "a", LoraConfig(rank=4, alpha=8.0), seed=0)
        set_active(self.loaded, [("a", 1.0)])
        torch.manual_seed(2)
        self.parameters = adapter.named_parameters()
        with torch.no_grad():
            for parameter in self.parameters.values():
                parameter.copy_(torch.randn(parameter.shape) * 0.05)
        recipe = run_spec(precision="fp32", compute_dtype="fp32").recipe
        self.runner = StepRunner(
            self.loaded, recipe, backward=lambda loss: loss.backward(), gauge=MemoryGauge(self.loaded.device)
        )

    def gradients(self) -> dict[str, torch.Tensor]:
        found = {}
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                found[name], parameter.grad = parameter.grad, None
        return found

    def trained(self, samples: list[Sample], layout: Layout) -> dict[str, torch.Tensor]:
        self.runner.train(samples, layout, 0)
        return self.gradients()


def samples(*lengths: int) -> list[Sample]:
    torch.manual_seed(4)
    found = []
    for number, length in enumerate(lengths):
        ids = torch.randint(0, 256, (length + 1,), dtype=torch.int32).numpy()
        found.append(Sample(number, ids[:-1], torch.arange(length).numpy(), ids[1:].astype("int64")))
    return found


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4 * scale + 1e-8, msg=name)


@pytest.mark.parametrize("kind", FAMILIES)
def test_one_sample_has_the_objective_of_transformers(kind: str, tmp_path: Path) -> None:
    setup = Setup(write(tmp_path / kind, kind))
    (sample,) = samples(23)
    model: Any = setup.loaded.model
    model.set_attn_implementation("eager")
    # Labels that transformers does not shift: ours are shifted already.
    out = model(torch.from_numpy(sample.ids).long()[None], use_cache=False)
    loss = F.cross_entropy(out.logits[0].float(), torch.from_numpy(sample.targets))
    assert out.aux_loss.requires_grad
    (loss + model.router_aux_loss_coef * out.aux_loss).backward()
    expected = setup.gradients()
    loss = F.cross_entropy(
        model(torch.from_numpy(sample.ids).long()[None], use_cache=False).logits[0], torch.from_numpy(sample.targets)
    )
    loss.backward()
    without = setup.gradients()
    model.set_attn_implementation("edgepeft_packed")
    found = setup.trained([sample], WIDE)
    assert_close(found, expected)
    # It is no small part of it, so that leaving it out would show.
    most = max(float((expected[name] - without[name]).norm() / expected[name].norm()) for name in expected)
    assert most > 0.05


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_layout_changes_nothing(kind: str, tmp_path: Path) -> None:
    setup = Setup(write(tmp_path / kind, kind))
    several = samples(23, 5, 11, 17)
    expected = setup.trained(several, WIDE)
    for cap, mode in ((1, "layer"), (30, "none"), (40, "layer")):
        layout = Layout(micro_batch_tokens=cap, checkpointing=mode, loss_chunk_tokens=7)  # type: ignore[arg-type]
        assert_close(setup.trained(several, layout), expected)


@pytest.mark.parametrize("kind", FAMILIES)
def test_nothing_is_balanced_where_the_config_does_not_ask(kind: str, tmp_path: Path) -> None:
    assert balance_of(load(write(tmp_path / "silent", kind, asked=False)).model) is None
    assert balance_of(load(write(tmp_path / "asked", kind)).model) is not None


def test_the_shown_loss_is_the_cross_entropy_of_evaluations(tmp_path: Path) -> None:
    setup = Setup(write(tmp_path / "mixtral", "mixtral"))
    several = samples(23, 5)
    assert setup.runner.train(several, WIDE, 0).loss == pytest.approx(setup.runner.evaluate(several, WIDE).loss)


def test_a_dry_run_follows_it() -> None:
    config = {"model_type": "mixtral", **COMMON, **FAMILIES["mixtral"], "dtype": "bfloat16"}
    spec = run_spec(precision="bf16", rank=4)

    def saved(asked: bool) -> int:
        request = DryRunRequest(spec, config | {"output_router_logits": asked}, Workload(120, 40, 100), CPU)
        step = next(phase for phase in dry_run(request).memory.phases if phase.name == "train step")
        return step.total_bytes

    assert saved(True) > saved(False)
