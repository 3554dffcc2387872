"""LoRA of the embedding and the output head: PEFT's logits, gradients and files, the chunked loss, chat, refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))

from accuracy.closed_form import Case, compare, draw

from edgepeft.chat.protocol import AdapterUse, Sampling
from edgepeft.engine.combine import jobs
from edgepeft.engine.combine.composition import combine
from edgepeft.engine.combine.outline import open_outline
from edgepeft.engine.inference.generate import generate
from edgepeft.engine.inference.score import score_losses
from edgepeft.engine.inference.session import Session
from edgepeft.engine.ledger import LiveBytes
from edgepeft.engine.methods import AttachedAdapter, attach, set_active
from edgepeft.engine.methods.files import read_adapter, save_adapter
from edgepeft.engine.model.load import LoadedModel, load_model
from edgepeft.engine.model.tables import LowRank
from edgepeft.engine.training.batches import Sample
from edgepeft.engine.training.loss import Head, summed_loss
from edgepeft.engine.training.memory import MemoryGauge
from edgepeft.engine.training.step import StepRunner
from edgepeft.errors import BadInput, UsageError
from edgepeft.library.combine_client import request_for
from edgepeft.library.combine_parts import weighted_parts
from edgepeft.library.combined_card import adapter_config
from edgepeft.library.combining import plan_combination
from edgepeft.library.merging import ExportRequest
from edgepeft.library.parent import find_parent
from edgepeft.methods import LoraConfig, count_parameters
from edgepeft.models.store import ensure_model
from edgepeft.spec import Layout
from merging import merge
from shapes import run_spec
from tiny import write_tiny_model, write_tokenizer

CPU = torch.device("cpu")
IDS = torch.randint(1, 250, (2, 19), generator=torch.Generator().manual_seed(5))
COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 272,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": 256,
    "eos_token_id": 258,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}),
    "gemma3": ("gemma3_text", {"sliding_window": 6, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0}),
    "gemma3, untied": ("gemma3_text", {"query_pre_attn_scalar": 8, "tie_word_embeddings": False}),
    "granite": ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "tie_word_embeddings": True}),
    "cohere2": ("cohere2", {"sliding_window": 6, "logit_scale": 0.5}),
}
BOTH = ("all-linear", "embed_tokens", "lm_head")
TARGETS = {"both": BOTH, "embedding": ("embed_tokens", "q_proj"), "head": ("lm_head",)}

each_kind = pytest.mark.parametrize("kind", KINDS)


def write(folder: Path, kind: str) -> Path:
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


def moved(loaded: LoadedModel, config: LoraConfig, name: str = "a") -> AttachedAdapter:
    adapter = attach(loaded, name, config, seed=1)
    move(adapter.named_parameters().values())
    set_active(loaded, [(name, 1.0)])
    return adapter


def move(parameters: Any, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(IDS).logits
    return out


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


# PEFT ----------------------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("names", [["embed_tokens", "lm_head", "q_proj"], ["embed_tokens"], ["lm_head"]])
def test_pefts_adapter_loads_here_and_ours_loads_there(tmp_path: Path, kind: str, names: list[str]) -> None:
    folder = write(tmp_path / "model", kind)
    settings: Any = PeftLoraConfig(
        r=4, lora_alpha=6, target_modules=names, rank_pattern={names[0]: 3}, task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(plain(folder), settings).eval()
    move(parameter for parameter in theirs.parameters() if parameter.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs")
    # It holds the base's own tables, too.
    assert any("base_layer" in name for name in load_file(tmp_path / "theirs" / "adapter_model.safetensors"))
    expected = logits(theirs)
    loaded = load(folder)
    base = logits(loaded.model)
    adapter = read_adapter(tmp_path / "theirs", loaded, "t")
    set_active(loaded, [("t", 1.0)])
    torch.testing.assert_close(logits(loaded.model), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(base, expected, atol=1e-3)
    save_adapter(tmp_path / "ours", adapter, "tiny")
    assert not any("base_layer" in name for name in load_file(tmp_path / "ours" / "adapter_model.safetensors"))
    back = PeftModel.from_pretrained(plain(folder), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(back), expected, rtol=1e-5, atol=1e-5)


def make_samples() -> list[Sample]:
    random = torch.Generator().manual_seed(2)
    samples = []
    for number, length in enumerate((11, 3, 19, 70)):
        ids = torch.randint(1, 250, (length + 1,), generator=random).numpy()
        rows = torch.arange(1, length).numpy()
        samples.append(Sample(number, ids[:-1].astype("int32"), rows, ids[rows + 1].astype("int64")))
    return samples


def runner_of(loaded: LoadedModel) -> StepRunner:
    spec = run_spec()
    runner = StepRunner(loaded, spec.recipe, backward=lambda loss: loss.backward(), gauge=MemoryGauge(CPU))
    assert runner.check() == ""
    return runner


def clear(adapter: AttachedAdapter) -> None:
    for parameter in adapter.named_parameters().values():
        parameter.grad = None


@each_kind
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS.keys())
def test_a_step_has_pefts_loss_and_gradients(tmp_path: Path, kind: str, targets: tuple[str, ...]) -> None:
    folder = write(tmp_path / "model", kind)
    loaded, samples = load(folder), make_samples()
    adapter = moved(loaded, LoraConfig(rank=4, alpha=6.0, targets=targets))
    save_adapter(tmp_path / "ours", adapter, "tiny")
    twin = PeftModel.from_pretrained(plain(folder), tmp_path / "ours", is_trainable=True)
    total = torch.zeros(())
    for sample in samples:
        out = twin(torch.tensor(sample.ids)[None].long()).logits[0]
        total = total + F.cross_entropy(out[sample.rows], torch.tensor(sample.targets), reduction="sum")
    expected = total / sum(len(sample.rows) for sample in samples)
    expected.backward()
    theirs = {name.replace(".default", ""): p.grad for name, p in twin.named_parameters() if p.grad is not None}
    runner, named = runner_of(loaded), adapter.named_parameters()
    assert len(theirs) == len(named)
    for layout in (Layout(512, "layer", 16), Layout(32, "none", 64)):
        clear(adapter)
        sums = runner.train(samples, layout, 0)
        assert sums.loss / sums.trained_tokens == pytest.approx(expected.item(), rel=1e-5)
        for name, parameter in named.items():
            wanted = theirs[f"base_model.model.{name}"]
            assert parameter.grad is not None, name
            assert float((parameter.grad - wanted).norm()) < 3e-5 * float(wanted.norm()), name


# The loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("learns_below", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_chunked_loss_is_that_of_the_formed_matrix(
    softcap: float | None, learns_below: bool, dropout: float
) -> None:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 90, 24, generator=random, dtype=torch.float64).requires_grad_(learns_below)
    weight, A, B, mask = (
        torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((150, 24), (3, 24), (150, 3), (90, 24))
    )
    mask = (mask > 0).double() / (1 - dropout)
    A.requires_grad_()
    B.requires_grad_()
    bias = torch.randn(150, generator=random, dtype=torch.float64)
    rows, targets = torch.arange(3, 88), torch.randint(0, 150, (85,), generator=random)
    seen = hidden[0] * mask if dropout else hidden[0]
    out = (hidden[0] @ weight.t() + bias + 0.5 * seen @ A.t() @ B.t()) * 0.7
    out = out if softcap is None else softcap * torch.tanh(out / softcap)
    expected = F.cross_entropy(out[rows], targets, reduction="sum")
    inputs = [A, B, *([hidden] if learns_below else [])]
    wanted = torch.autograd.grad(2 * expected, inputs)
    low = LowRank(A.detach().float().requires_grad_(), B.detach().float().requires_grad_(), 0.5)
    low = low._replace(mask=(lambda hidden: mask.float()) if dropout else None)
    below = hidden.detach().float().requires_grad_(learns_below)
    head = Head(weight.float(), bias.float(), 0.7, softcap, (low,))
    loss = summed_loss(below, rows, targets, head, 32)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    found = torch.autograd.grad(2 * loss, [low.A, low.B, *([below] if learns_below else [])])
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).norm()) < 1e-5 * float(other.norm())
    with torch.no_grad():
        assert float(summed_loss(below, rows, targets, head, 64)) == pytest.approx(float(expected), rel=1e-5)


def test_the_product_beside_a_head_is_never_formed() -> None:
    vocabulary, width, rank = 20_000, 64, 4
    weight, A, B = torch.randn(vocabulary, width), torch.randn(rank, width), torch.zeros(vocabulary, rank)
    hidden = torch.randn(1, 128, width).requires_grad_()
    head = Head(weight, added=(LowRank(A.requires_grad_(), B.requires_grad_(), 1.0),))
    rows = torch.arange(128)
    with LiveBytes(CPU, known={"workspace": [weight, A, B, hidden]}, others=False) as ledger:
        start = ledger.live_bytes
        summed_loss(hidden, rows, rows, head, 16).backward()
    # A chunk's logits and their float32 scratch, and B's gradient.
    assert ledger.peak_bytes - start < 2 * 16 * 4 * vocabulary + 1.5 * B.nbytes + 4 * hidden.nbytes
    assert B.grad is not None


@pytest.mark.parametrize("compute", ["bf16", "fp32"])
def test_what_is_dropped_depends_on_the_sample_alone(tmp_path: Path, compute: Any) -> None:
    folder, samples = write(tmp_path / "model", "llama, untied"), make_samples()
    loaded = load(folder, compute, compute)
    adapter = moved(loaded, LoraConfig(rank=4, alpha=6.0, targets=BOTH, dropout=0.2))
    runner = runner_of(loaded)
    found = []
    for layout in (Layout(512, "none", 64), Layout(32, "layer", 16), Layout(40, "layer", 64)):
        clear(adapter)
        runner.train(samples, layout, 3)
        found.append({name: value.grad for name, value in adapter.named_parameters().items()})
    clear(adapter)
    runner.train(samples, layout, 4)
    for name, first in found[0].items():
        assert first is not None
        for other in found[1:]:
            assert float((first - other[name]).norm()) < (0.05 if compute == "bf16" else 1e-5) * float(first.norm())
        last = adapter.named_parameters()[name].grad
        assert last is not None
        assert float((first - last).norm()) > 0.1 * float(first.norm())


# Chat and scoring ----------------------------------------------------------------------------------------------------


@each_kind
def test_chat_and_scoring_use_both_tables(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path / "model", kind)
    loaded = load(folder)
    adapter = moved(loaded, LoraConfig(rank=4, alpha=24.0, targets=BOTH))
    save_adapter(tmp_path / "saved", adapter, "m")
    set_active(loaded, [])
    session, greedy = Session(loaded), Sampling(temperature=0.0, max_new_tokens=8)
    before = generate(session, [10, 20, 30], [], greedy).ids
    session.activate([AdapterUse(str(tmp_path / "saved"))])
    made = generate(session, [10, 20, 30], [], greedy).ids
    twin = PeftModel.from_pretrained(plain(folder), tmp_path / "saved").eval()
    ids = [10, 20, 30]
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(twin(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert made == ids[3:]
    with torch.no_grad():
        hidden = loaded.decoder(IDS, use_cache=False).last_hidden_state[:, -1].contiguous()
        torch.testing.assert_close(session.logits(hidden), logits(twin)[:, -1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(session.logits(hidden[:1]), logits(twin)[:1, -1], rtol=1e-4, atol=1e-4)
        expected = F.cross_entropy(logits(twin)[0, :-1], IDS[0, 1:])
    losses, counts = score_losses(session, [(IDS[0].tolist(), [True] * IDS.shape[1])])
    assert counts == [IDS.shape[1] - 1]
    assert losses[0] == pytest.approx(float(expected), rel=1e-4)
    session.activate([])
    assert generate(session, [10, 20, 30], [], greedy).ids == before


def test_a_tied_table_is_changed_on_one_side_alone(tmp_path: Path) -> None:
    loaded = load(write(tmp_path / "model", "llama, tied"))
    assert loaded.is_tied
    with torch.no_grad():
        embedding, head = loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()
        hidden = torch.randn(1, 3, 64)
        before = embedding(IDS), head(hidden)
        moved(loaded, LoraConfig(rank=4, targets=("embed_tokens",)), "e")
        assert not torch.equal(embedding(IDS), before[0])
        assert torch.equal(head(hidden), before[1])
        moved(loaded, LoraConfig(rank=4, targets=("lm_head",)), "h")
        assert torch.equal(embedding(IDS), before[0])
        assert not torch.equal(head(hidden), before[1])


# Refusals ------------------------------------------------------------------------------------------------------------


def test_names_of_other_models_stand_for_the_same_tables(tmp_path: Path) -> None:
    loaded = load(write(tmp_path / "model", "llama, untied"))
    config = LoraConfig(rank=4, targets=("wte", "model.embed_tokens", "embed_out"))
    adapter = attach(loaded, "a", config, seed=0)
    assert list(adapter.updates) == ["model.embed_tokens", "lm_head"]
    assert count_parameters(config, loaded.shape) == 2 * 4 * (272 + 64)
    save_adapter(tmp_path / "saved", adapter, "m")
    settings = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["embed_tokens", "lm_head"]
    assert PeftModel.from_pretrained(plain(tmp_path / "model"), tmp_path / "saved")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda settings, tensors: settings.update(ensure_weight_tying=True), "embedding and head as one"),
        (lambda settings, tensors: settings.update(use_dora=True), "DoRA changes linears of layers alone"),
        (lambda settings, tensors: tensors.pop(_key("embed_tokens.lora_embedding_A")), "lora_embedding_A is missing"),
        (lambda settings, tensors: tensors.pop("base_model.model.lm_head.lora_B.weight"), "lora_B.weight is missing"),
        (
            lambda settings, tensors: [tensors.pop(name) for name in list(tensors) if "lm_head" in name],
            "lm_head.* is missing, though adapter_config.json targets it",
        ),
        (
            lambda settings, tensors: tensors.update({_key("embed_tokens.base_layer.weight"): torch.zeros(275, 64)}),
            "trained with 275 rows in model.embed_tokens, and this base has 272",
        ),
        (
            lambda settings, tensors: tensors.update({_key("embed_tokens.base_layer.weight"): torch.zeros(272, 64)}),
            "trained with other values in model.embed_tokens",
        ),
        (
            lambda settings, tensors: tensors.update(
                {_key("layers.0.mlp.up_proj.base_layer.weight"): torch.zeros(2, 2)}
            ),
            "fits no layer",
        ),
    ],
)
def test_files_that_belong_to_another_base_or_are_no_such_thing_are_refused(
    tmp_path: Path, change: Any, message: str
) -> None:
    loaded = load(write(tmp_path / "model", "llama, tied"))
    save_adapter(tmp_path, attach(loaded, "a", LoraConfig(rank=4, targets=BOTH), seed=0), "tiny")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(settings, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(BadInput, match=message) as caught:
        read_adapter(tmp_path, loaded, "b")
    assert "\n" not in str(caught.value)
    assert not any("b" in site.adapters for site in loaded.sites().values())


def _key(ending: str) -> str:
    return f"base_model.model.model.{ending}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": BOTH, "dora": True}, "DoRA changes linears of layers alone"),
        ({"targets": BOTH, "ranks": {"lm_head": 65}}, "rank 65 exceeds the smaller dimension 64 of lm_head"),
        ({"targets": ("q_proj",), "ranks": {"lm_head": 8}}, "'lm_head' is no linear that is targeted"),
        ({"targets": ("other.embed_tokens",)}, "target 'other.embed_tokens' is not in this model"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(tiny_model: Path, options: Any, message: str) -> None:
    loaded = load(tiny_model)
    with pytest.raises(UsageError, match=message) as caught:
        attach(loaded, "a", LoraConfig(rank=4, **options), seed=0)
    assert "\n" not in str(caught.value)
    if "other" not in message:
        with pytest.raises(UsageError, match=message.replace(" of lm_head", "")):
            count_parameters(LoraConfig(rank=4, **options), loaded.shape)


# Combining, merging, exporting, continuing ---------------------------------------------------------------------------


def saved(folder: Path, loaded: LoadedModel, targets: tuple[str, ...], seed: int) -> Path:
    adapter = attach(loaded, str(seed), LoraConfig(rank=2 + seed, targets=targets), seed=seed)
    move(adapter.named_parameters().values(), seed)
    save_adapter(folder, adapter, loaded.entry.name)
    return folder


def test_heads_are_combined_exactly_and_embeddings_refused(tmp_path: Path) -> None:
    loaded = load(write(tmp_path / "model", "llama, tied"))
    one = saved(tmp_path / "one", loaded, ("lm_head", "q_proj"), 1)
    two = saved(tmp_path / "two", loaded, ("lm_head",), 2)
    set_active(loaded, [("1", 0.7), ("2", 0.3)])
    expected = logits(loaded.model)
    plan = plan_combination("mix", weighted_parts([f"{one}=0.7", f"{two}=0.3"])[0], "exact")
    (tmp_path / "mix").mkdir()
    made = combine(request_for(plan, tmp_path / "mix" / "adapter_model.safetensors"))
    (tmp_path / "mix" / "adapter_config.json").write_text(json.dumps(adapter_config(plan, made.ranks)))
    read_adapter(tmp_path / "mix", loaded, "mix")
    set_active(loaded, [("mix", 1.0)])
    torch.testing.assert_close(logits(loaded.model), expected, rtol=1e-4, atol=1e-4)
    other = saved(tmp_path / "other", loaded, ("embed_tokens",), 3)
    with pytest.raises(BadInput, match="lora_embedding_A belongs to no LoRA beside a linear layer"):
        weighted_parts([f"{one}=1", f"{other}=1"])


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("kind", ["llama, untied", "gemma3, untied"])
def test_merged_it_is_the_adapter_on_its_base(tmp_path: Path, kind: str, targets: tuple[str, ...]) -> None:
    loaded = load(write(tmp_path / "model", kind))
    adapter = saved(tmp_path / "saved", loaded, targets, 1)
    set_active(loaded, [("1", 1.0)])
    expected = logits(loaded.model)
    merged = merge(loaded.entry, adapter, tmp_path / "a" / "b")
    torch.testing.assert_close(logits(plain(tmp_path / "a" / "b")), expected, rtol=1e-4, atol=1e-4)
    assert merged.changed == len(load_file(adapter / "adapter_model.safetensors")) / 2
    assert merged.drift.mean_kl < 1e-6


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS.keys())
def test_one_table_for_both_takes_no_update_of_one_of_them(tmp_path: Path, targets: tuple[str, ...]) -> None:
    loaded = load(write(tmp_path / "model", "llama, tied"))
    adapter = saved(tmp_path / "saved", loaded, targets, 1)
    with pytest.raises(BadInput, match="this base has one table for both") as caught:
        merge(loaded.entry, adapter, tmp_path / "merged")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "merged").iterdir()) == []


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS.keys())
def test_an_export_is_pefts_or_refused(tmp_path: Path, targets: tuple[str, ...]) -> None:
    folder = write(tmp_path / "model", "llama, tied")
    loaded = load(folder)
    adapter = saved(tmp_path / "saved", loaded, targets, 1)
    set_active(loaded, [("1", 1.0)])

    def export(format: Any) -> Path:
        request = ExportRequest(loaded.entry.name, str(adapter), "title", str(tmp_path / format), format)
        (tmp_path / format).mkdir()
        jobs.export(request, lambda what, fraction: None)
        return tmp_path / format

    twin = PeftModel.from_pretrained(plain(folder), export("peft")).eval()
    torch.testing.assert_close(logits(twin), logits(loaded.model), rtol=1e-4, atol=1e-3)
    with pytest.raises(BadInput, match=r"llama\.cpp takes updates of the layers' linears alone"):
        export("gguf")
    assert list((tmp_path / "gguf").iterdir()) == []


def test_pefts_adapter_is_read_by_what_reads_adapters_alone(tmp_path: Path) -> None:
    """A base without values cannot be compared with the table that PEFT's file carries."""
    folder = write(tmp_path / "model", "llama, tied")
    settings: Any = PeftLoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], task_type="CAUSAL_LM")
    get_peft_model(plain(folder), settings).save_pretrained(tmp_path / "theirs")
    outline = open_outline(ensure_model(str(folder)))
    assert list(read_adapter(tmp_path / "theirs", outline, "t").updates) == ["model.embed_tokens", "lm_head"]


def test_an_adapter_of_both_tables_can_be_continued(tmp_path: Path) -> None:
    loaded = load(write(tmp_path / "model", "llama, tied"))
    config = LoraConfig(rank=4, targets=("q_proj", "embed_tokens", "lm_head"), ranks={"lm_head": 8})
    save_adapter(tmp_path / "saved", attach(loaded, "a", config, seed=0), "m")
    assert find_parent(str(tmp_path / "saved"), loaded.entry).method == config
    save_adapter(tmp_path / "head", attach(loaded, "b", LoraConfig(rank=4, targets=("lm_head",)), seed=0), "m")
    assert find_parent(str(tmp_path / "head"), loaded.entry).method == LoraConfig(rank=4, targets=("lm_head",))
    larger = ensure_model(str(write_tiny_model(tmp_path / "larger", vocab_size=300)))
    with pytest.raises(BadInput, match="has 272 tokens, and this base has 300"):
        find_parent(str(tmp_path / "head"), larger)


# Memory --------------------------------------------------------------------------------------------------------------


def cases() -> list[Case]:
    found = []
    targets = [BOTH, ("embed_tokens", "all-linear"), ("lm_head",), ("all-linear", "lm_head"), ("embed_tokens",)]
    for place, case in enumerate(draw(seed=13, count=10)):
        method = msgspec.structs.replace(
            case.spec.recipe.method, targets=targets[place % 5], dropout=0.1 if place % 2 else 0.0
        )
        recipe = msgspec.structs.replace(case.spec.recipe, method=method)
        spec = msgspec.structs.replace(case.spec, recipe=recipe)
        workload = msgspec.structs.replace(case.workload, alone=place % 4 < 2)
        found.append(msgspec.structs.replace(case, spec=spec, workload=workload))
    return found


def test_the_closed_form_is_what_the_dry_run_counts() -> None:
    rows = [row for case in cases() for row in compare(case)]
    assert {row["phase"] for row in rows} == {"train step", "evaluation"}
    assert max(abs(row["error"]) for row in rows) < 1e-3
