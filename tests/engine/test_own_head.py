"""Output heads that edgepeft does not know: the model's own code, with the loss and gradients of plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from edgepeft.engine.inference.score import score_losses
from edgepeft.engine.inference.session import Session
from edgepeft.engine.ledger import LiveBytes
from edgepeft.engine.methods import AttachedAdapter, attach, set_active
from edgepeft.engine.model.load import LoadedModel, load_model
from edgepeft.engine.training import opening
from edgepeft.engine.training.batches import Sample
from edgepeft.engine.training.memory import MemoryGauge
from edgepeft.engine.training.step import StepRunner
from edgepeft.errors import BadInput, UsageError
from edgepeft.methods import LoraConfig
from edgepeft.models.store import ensure_model
from edgepeft.runs.events import StepDone, Warned
from edgepeft.spec import Layout
from shapes import run_spec
from tiny import write_tiny_model
from training_runs import of_type, tiny_base, tiny_run, train

VOCABULARY = 260


class Shifted(LlamaForCausalLM):
    """Its forward bends its logits, row by row."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        out = super().forward(*arguments, **options)
        out.logits = out.logits + 0.3 * torch.sin(3 * out.logits)
        return out


class Smeared(LlamaForCausalLM):
    """Its logits depend on the rows before them."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        out = super().forward(*arguments, **options)
        count = torch.arange(1, out.logits.shape[1] + 1).view(1, -1, 1)
        out.logits = out.logits + 0.5 * out.logits.cumsum(1) / count
        return out


def sequential(model: Any) -> None:
    torch.manual_seed(3)
    model.lm_head = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, VOCABULARY, bias=False))
    model.requires_grad_(False)


def shifted(model: Any) -> None:
    model.__class__ = Shifted


def smeared(model: Any) -> None:
    model.__class__ = Smeared


HEADS = {"sequential": (sequential, True), "shifted": (shifted, True), "smeared": (smeared, False)}


def load(folder: Path) -> LoadedModel:
    return load_model(ensure_model(str(folder)), precision="fp32", compute_dtype="fp32", device=torch.device("cpu"))


def adapted(loaded: LoadedModel, targets: tuple[str, ...] = ("all-linear",)) -> AttachedAdapter:
    adapter = attach(loaded, "a", LoraConfig(rank=4, alpha=8.0, targets=targets), seed=0)
    set_active(loaded, [("a", 1.0)])
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.named_parameters().values():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return adapter


def samples() -> list[Sample]:
    torch.manual_seed(4)
    found = []
    for number, length in enumerate((11, 4, 19, 7)):
        ids = torch.randint(0, 256, (length + 1,), dtype=torch.int32).numpy()
        rows = torch.arange(number, length).numpy()
        found.append(Sample(number, ids[:-1], rows, ids[1 + number :].astype("int64")))
    return found


def runner_of(loaded: LoadedModel) -> StepRunner:
    recipe = run_spec(precision="fp32", compute_dtype="fp32").recipe
    return StepRunner(loaded, recipe, backward=lambda loss: loss.backward(), gauge=MemoryGauge(loaded.device))


def plain(loaded: LoadedModel, trained: int) -> float:
    """Each sample through the model's own forward, all its logits, plain cross-entropy."""
    model: Any = loaded.model
    model.set_attn_implementation("eager")
    total = 0.0
    for sample in samples():
        logits = model(torch.from_numpy(sample.ids).long()[None], use_cache=False).logits[0]
        loss = F.cross_entropy(logits[torch.from_numpy(sample.rows)], torch.from_numpy(sample.targets), reduction="sum")
        (loss / trained).backward()
        total += loss.item()
    return total


@pytest.mark.parametrize("targets", [("all-linear",), ("all-linear", "embed_tokens", "lm_head")])
@pytest.mark.parametrize("name", HEADS)
def test_loss_and_gradients_are_those_of_plain_transformers(
    name: str, targets: tuple[str, ...], tiny_model: Path
) -> None:
    if name == "sequential" and "lm_head" in targets:
        pytest.skip("a head of several modules has no one update")
    change, by_row = HEADS[name]
    loaded = load(tiny_model)
    change(loaded.model)
    adapter = adapted(loaded, targets)
    trained = sum(len(sample.targets) for sample in samples())
    expected = plain(loaded, trained)
    parameters = adapter.named_parameters()
    gradients = {}
    for key, parameter in parameters.items():
        assert parameter.grad is not None
        gradients[key], parameter.grad = parameter.grad, None
    runner = runner_of(loaded)
    warning = runner.check()
    assert "output head" in warning
    assert ("own code" in warning) == by_row
    for mode, cap, chunk in (("layer", 64, 5), ("none", 1, 100), ("layer", 20, 1)):
        layout = Layout(micro_batch_tokens=cap, checkpointing=mode, loss_chunk_tokens=chunk)  # type: ignore[arg-type]
        sums = runner.train(samples(), layout, 0)
        assert sums.loss == pytest.approx(expected, rel=1e-5)
        for key, parameter in parameters.items():
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-3, atol=1e-6, msg=key)
            parameter.grad = None
        assert runner.evaluate(samples(), layout).loss == pytest.approx(expected, rel=1e-5)


def test_dropout_before_such_a_head_is_refused(tiny_model: Path) -> None:
    loaded = load(tiny_model)
    shifted(loaded.model)
    for targets in (("q_proj",), ("q_proj", "lm_head")):
        attach(loaded, targets[-1], LoraConfig(rank=4, targets=targets, dropout=0.1), seed=0)
    set_active(loaded, [("q_proj", 1.0)])
    assert "own code" in runner_of(loaded).check()
    set_active(loaded, [("lm_head", 1.0)])
    with pytest.raises(UsageError, match=r"dropout before the output head of Shifted.*--set dropout=0") as caught:
        runner_of(loaded).check()
    assert "\n" not in str(caught.value)


def test_a_known_head_is_told_nothing_of(tiny_model: Path) -> None:
    assert runner_of(load(tiny_model)).check() == ""


@pytest.mark.parametrize("name", ["sequential", "shifted"])
def test_chat_and_scores_are_those_of_plain_transformers(name: str, tiny_model: Path) -> None:
    loaded = load(tiny_model)
    HEADS[name][0](loaded.model)
    session = Session(loaded)
    ids = list(range(5, 14))
    with torch.inference_mode():
        hidden = loaded.decoder(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        logits = loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    torch.testing.assert_close(session.logits(hidden), logits, atol=1e-5, rtol=1e-5)
    expected = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]))
    (loss,), _ = score_losses(session, [(ids, [True] * len(ids))])
    assert loss == pytest.approx(float(expected), rel=1e-5)


def test_chat_refuses_a_head_that_looks_at_several_tokens(tiny_model: Path) -> None:
    loaded = load(tiny_model)
    smeared(loaded.model)
    with pytest.raises(BadInput, match="looks at more than one token"):
        Session(loaded)


def test_logits_of_all_rows_never_exist(tmp_path: Path) -> None:
    loaded = load(write_tiny_model(tmp_path / "wide", vocab_size=20_000))
    shifted(loaded.model)
    adapted(loaded)
    runner = runner_of(loaded)
    runner.check()
    ids = torch.arange(257, dtype=torch.int32).numpy()
    sample = Sample(0, ids[:-1], torch.arange(256).numpy(), ids[1:].astype("int64"))
    with LiveBytes(torch.device("cpu")) as ledger:
        before = ledger.live_bytes
        runner.train([sample], Layout(micro_batch_tokens=256, loss_chunk_tokens=8), 0)
    assert ledger.peak_bytes - before < 256 * 20_000 * 4 / 2


def test_logits_that_are_not_finite_are_refused(tiny_model: Path) -> None:
    loaded = load(tiny_model)
    sequential(loaded.model)
    head: Any = loaded.model.lm_head
    head[0].weight.fill_(float("nan"))
    with pytest.raises(BadInput, match="not finite"):
        runner_of(loaded).check()


def test_a_run_says_that_it_takes_the_plain_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = opening.load_model

    def load_changed(*arguments: Any, **options: Any) -> LoadedModel:
        loaded = real(*arguments, **options)
        sequential(loaded.model)
        return loaded

    monkeypatch.setattr(opening, "load_model", load_changed)
    events = train(tiny_run(tmp_path, tiny_base(tmp_path)))
    assert [event.message for event in of_type(events, Warned) if "output head of LlamaForCausalLM" in event.message]
    losses = [done.loss for done in of_type(events, StepDone)]
    assert losses[-1] < losses[0]


def test_hidden_states_of_rows_are_answered_alone(tiny_model: Path) -> None:
    loaded = load(tiny_model)
    sequential(loaded.model)
    runner = runner_of(loaded)
    runner.check()
    hidden = torch.randn(1, 3, 64)
    assert runner._own_head is not None
    found: Tensor = runner._own_head.logits(hidden)
    head: Any = loaded.model.lm_head
    assert torch.equal(found, head(hidden))
    # The decoder answers for itself again.
    ids = torch.tensor([[1, 2, 3, 4]])
    assert loaded.decoder(input_ids=ids, use_cache=False).last_hidden_state.shape == (1, 4, 64)
