"""Full fine-tuning over several families: gradients of a plain float64 model, tied and untied heads, chat, refusals."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))

from accuracy.closed_form import FAMILIES as SHAPES
from accuracy.closed_form import Case, compare, draw

from edgepeft.chat.protocol import AdapterUse, Sampling
from edgepeft.engine.inference.generate import generate
from edgepeft.engine.inference.session import Session
from edgepeft.engine.ledger import LiveBytes
from edgepeft.engine.methods import AttachedAdapter, attach, detach, set_active
from edgepeft.engine.methods.files import read_adapter, save_adapter
from edgepeft.engine.model.load import LoadedModel, load_model
from edgepeft.engine.training.batches import Sample
from edgepeft.engine.training.memory import MemoryGauge
from edgepeft.engine.training.step import StepRunner
from edgepeft.errors import BadInput, UsageError
from edgepeft.methods import FullConfig, LoraConfig, count_parameters
from edgepeft.models.store import ensure_model
from edgepeft.spec import Layout, Recipe
from tiny import write_tiny_model, write_tokenizer
from training_runs import tiny_plan

CPU = torch.device("cpu")
COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 272,  # the tokenizer has 260: rows beyond it are padding
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 256,
    "eos_token_id": 258,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen2, untied": ("qwen2", {"tie_word_embeddings": False}),
    "gemma3": ("gemma3_text", {"sliding_window": 6, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0}),
    "olmo2": ("olmo2", {"tie_word_embeddings": True}),
    "phi3": ("phi3", {"sliding_window": 6}),
    "granite": ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "tie_word_embeddings": True}),
    "cohere2": ("cohere2", {"sliding_window": 6}),
}
TIED = ("llama, tied", "llama, untied")


def write(folder: Path, kind: str) -> Path:
    """A model whose biases and norms are not what they are initialised with."""
    family, options = KINDS[kind]
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **COMMON, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(torch.randn(parameter.shape) * 0.02)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def load(folder: Path, precision: Any = "fp32", compute: Any = "fp32") -> LoadedModel:
    return load_model(ensure_model(str(folder)), precision=precision, compute_dtype=compute, device=CPU)


def moved(loaded: LoadedModel, scale: float = 0.02) -> AttachedAdapter:
    adapter = attach(loaded, "a", FullConfig(), seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.named_parameters().values():
            parameter += torch.randn(parameter.shape, generator=generator) * scale
    set_active(loaded, [("a", 1.0)])
    return adapter


def make_samples() -> list[Sample]:
    random = torch.Generator().manual_seed(2)
    samples = []
    for number, length in enumerate((11, 3, 19, 70)):
        ids = torch.randint(1, 250, (length + 1,), generator=random).numpy()
        rows = torch.arange(1, length).numpy()
        samples.append(Sample(number, ids[:-1].astype("int32"), rows, ids[rows + 1].astype("int64")))
    return samples


def plain_gradients(folder: Path, values: dict[str, Tensor], samples: list[Sample]) -> tuple[float, dict[str, Tensor]]:
    """Of transformers' own model in float64 with these weights, one sample after the other."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    total = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        logits = model(torch.tensor(sample.ids)[None].long()).logits[0]
        total = total + F.cross_entropy(logits[sample.rows], torch.tensor(sample.targets), reduction="sum")
    loss = total / sum(len(sample.rows) for sample in samples)
    loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return float(loss.detach()), gradients


def train(loaded: LoadedModel, samples: list[Sample], layout: Layout, recipe: Recipe) -> float:
    runner = StepRunner(loaded, recipe, backward=lambda loss: loss.backward(), gauge=MemoryGauge(CPU))
    assert runner.check() == ""
    sums = runner.train(samples, layout, 0)
    return sums.loss / sums.trained_tokens


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    entry = ensure_model(str(write_tiny_model(tmp_path / "any")))
    return tiny_plan(tmp_path, entry).spec.recipe


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_a_plain_float64_model(tmp_path: Path, recipe: Recipe, kind: str) -> None:
    folder = write(tmp_path / "model", kind)
    loaded = load(folder)
    adapter = moved(loaded)
    assert count_parameters(FullConfig(), loaded.shape) == sum(v.numel() for v in adapter.state_dict().values())
    samples = make_samples()
    expected, wanted = plain_gradients(folder, adapter.state_dict(), samples)
    named = adapter.named_parameters()
    assert wanted.keys() == named.keys()
    for layout in (Layout(512, "layer", 16), Layout(32, "none", 64)):
        for parameter in named.values():
            parameter.grad = None
        assert train(loaded, samples, layout, recipe) == pytest.approx(expected, rel=1e-5)
        for name, parameter in named.items():
            assert parameter.grad is not None, name
            error = (parameter.grad.double() - wanted[name]).norm() / wanted[name].norm()
            assert float(error) < 2e-5, (name, float(error))


@pytest.mark.parametrize("kind", TIED)
def test_gradients_in_16_bit_are_near_those_in_float32(tmp_path: Path, recipe: Recipe, kind: str) -> None:
    folder, samples = write(tmp_path / "model", kind), make_samples()
    found = []
    for compute in ("bf16", "fp32"):
        loaded = load(folder, compute, compute)
        adapter = moved(loaded)
        train(loaded, samples, Layout(64, "layer", 16), recipe)
        found.append(adapter.named_parameters())
    for name, parameter in found[0].items():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        exact = found[1][name].grad
        assert exact is not None
        assert float((parameter.grad - exact).norm() / exact.norm()) < 0.1, name


@pytest.mark.parametrize("kind", TIED)
def test_a_table_has_one_gradient_and_no_second_one_on_the_way(tmp_path: Path, recipe: Recipe, kind: str) -> None:
    loaded = load(write(tmp_path / "model", kind))
    adapter = moved(loaded)
    names = [name for name in adapter.named_parameters() if "embed_tokens" in name or "lm_head" in name]
    assert len(names) == (1 if kind == "llama, tied" else 2)
    table = adapter.named_parameters()["model.embed_tokens.weight"]
    ids = torch.arange(8)[None]
    embedding = loaded.model.get_input_embeddings()
    embedding(ids).sum().backward()
    before = table.grad
    assert before is not None
    assert torch.equal(before.sum(1), 64.0 * (torch.arange(table.shape[0]) < 8))
    # A second time it goes into the same tensor, beside which hardly anything is made.
    with LiveBytes(CPU, known={"workspace": [table, before]}, others=False) as ledger:
        start = ledger.live_bytes
        embedding(torch.full((1, 3), 2)).sum().backward()
    assert table.grad is before
    assert float(before[2, 0]) == 4
    assert ledger.peak_bytes - start < table.nbytes / 4


@pytest.mark.parametrize("kind", TIED)
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_chat_answers_with_the_trained_head(tmp_path: Path, kind: str, compute: Any) -> None:
    folder = write(tmp_path / "model", kind)
    loaded = load(folder, compute, compute)
    adapter = moved(loaded, scale=0.3)
    save_adapter(tmp_path / "saved", adapter, "m")
    values = adapter.state_dict()
    detach(loaded, "a")
    session, greedy = Session(loaded), Sampling(temperature=0.0, max_new_tokens=8)
    before = generate(session, [10, 20, 30], [], greedy).ids
    session.activate([AdapterUse(str(tmp_path / "saved"))])
    made = generate(session, [10, 20, 30], [], greedy).ids
    assert made != before
    with torch.no_grad():
        hidden = loaded.decoder(torch.tensor([[10, 20, 30]]), use_cache=False).last_hidden_state
        own = loaded.model(torch.tensor([[10, 20, 30]]), use_cache=False).logits[:, -1]
        torch.testing.assert_close(session.logits(hidden[:, -1].contiguous()), own, rtol=2e-2, atol=2e-2)
    if compute == "fp32":
        twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        twin.load_state_dict(values, strict=False)
        ids = [10, 20, 30]
        with torch.no_grad():
            for _ in range(8):
                ids.append(int(twin(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert made == ids[3:]
    session.activate([])
    assert generate(session, [10, 20, 30], [], greedy).ids == before


def test_a_strength_between_is_the_model_between(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "llama, biases")
    loaded = load(folder)
    adapter = moved(loaded, scale=0.3)
    set_active(loaded, [("a", 0.25)])
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.lerp_(adapter.state_dict()[name], 0.25)
        ids = torch.arange(10, 30)[None]
        torch.testing.assert_close(loaded.model(ids).logits, twin(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("precision", "bits"), [("nf4", 4), ("int8", 8)])
def test_a_quantized_base_is_refused(tiny_model: Path, tmp_path: Path, precision: Any, bits: int) -> None:
    save_adapter(tmp_path / "saved", attach(load(tiny_model), "a", FullConfig(), seed=0), "m")
    loaded = load(tiny_model, precision, "bf16")
    message = f"an? {bits}-bit base cannot be trained as a whole.*--precision bf16"
    with pytest.raises(UsageError, match=message):
        attach(loaded, "a", FullConfig(), seed=0)
    with pytest.raises(BadInput, match=message):
        read_adapter(tmp_path / "saved", loaded, "a")
    assert not any(site.adapters for site in loaded.sites().values())


def test_a_parameter_of_an_unknown_kind_is_named(tiny_model: Path) -> None:
    loaded = load(tiny_model)
    loaded.model.register_parameter("prefix", nn.Parameter(torch.zeros(3), requires_grad=False))
    with pytest.raises(UsageError, match="prefix is of no kind that edgepeft trains"):
        attach(loaded, "a", FullConfig(), seed=0)
    attach(loaded, "b", LoraConfig(rank=2), seed=0)


def test_a_head_with_code_of_its_own_is_refused(tiny_model: Path) -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    loaded = load(tiny_model)
    next(table for path, table in loaded.tables().items() if path == "lm_head").module.__class__ = Doubled
    with pytest.raises(UsageError, match="output head is of no kind that edgepeft trains"):
        attach(loaded, "a", FullConfig(), seed=0)


def cases() -> list[Case]:
    """Some of the bench's, each with a tied and an untied head, and as a step's only micro-batch and not."""
    found = []
    for place, case in enumerate(draw(seed=11, count=len(SHAPES))[::2]):
        recipe = msgspec.structs.replace(
            case.spec.recipe, method=FullConfig(), precision=case.spec.recipe.compute_dtype
        )
        spec = msgspec.structs.replace(case.spec, recipe=recipe)
        workload = msgspec.structs.replace(case.workload, alone=place % 4 < 2)
        config = case.config | {"tie_word_embeddings": place % 2 == 0}
        found.append(msgspec.structs.replace(case, spec=spec, workload=workload, config=config))
    return found


def test_the_closed_form_is_what_the_dry_run_counts() -> None:
    rows = [row for case in cases() for row in compare(case)]
    assert {row["phase"] for row in rows} == {"train step", "evaluation"}
    assert max(abs(row["error"]) for row in rows) < 1e-3
