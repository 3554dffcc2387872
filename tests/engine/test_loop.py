"""The loop learns what a plain reference loop learns, whatever its layout and however often it is interrupted."""

from __future__ import annotations

import gc
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from edgepeft.data.prepare import describe_data, prepare
from edgepeft.data.schedule import step_samples
from edgepeft.engine.ledger import LiveBytes
from edgepeft.engine.methods import attach, set_active
from edgepeft.engine.model.load import load_model
from edgepeft.engine.training import loop, reading
from edgepeft.engine.training import step as step_module
from edgepeft.engine.training.batches import read_samples
from edgepeft.engine.training.memory import MemoryGauge
from edgepeft.engine.training.optimizer import FiniteWatch, learning_rate_at
from edgepeft.engine.training.step import StepRunner
from edgepeft.engine.training.stopping import StopRun
from edgepeft.errors import BadInput, EdgepeftError, OutOfMemory
from edgepeft.library.store import resolve_adapter
from edgepeft.methods import LoraConfig
from edgepeft.models.store import ModelEntry
from edgepeft.paths import home
from edgepeft.runs.control import request
from edgepeft.runs.events import (
    CheckpointSaved,
    Evaluated,
    Finished,
    MemoryMeasured,
    PhaseChanged,
    Started,
    StepDone,
    Warned,
)
from edgepeft.runs.layout import RunFolder
from edgepeft.spec import Layout
from out_of_memory import fail_at
from tiny import CHATML
from training_runs import of_type, tiny_base, tiny_plan, tiny_run, train, write_data

LAYOUT = Layout(micro_batch_tokens=160, loss_chunk_tokens=16)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture
def base(tmp_path: Path) -> ModelEntry:
    return tiny_base(tmp_path)


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


class Setup:
    """A loaded tiny model with an adapter that does something, and the samples of a step."""

    def __init__(self, folder: Path, entry: ModelEntry, **changes: Any) -> None:
        self.recipe = tiny_plan(folder, entry, **changes).spec.recipe
        self.loaded = load_model(entry, precision="fp32", compute_dtype="fp32", device=torch.device("cpu"))
        self.adapter = attach(self.loaded, "a", self.recipe.method, 0)
        set_active(self.loaded, [("a", 1.0)])
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in self.adapter.named_parameters().values():
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
        self.samples = read_samples(prepare(self.recipe.data, Path(entry.folder)).train, range(11))
        self.gauge = MemoryGauge(torch.device("cpu"))
        self.runner = StepRunner(self.loaded, self.recipe, backward=lambda loss: loss.backward(), gauge=self.gauge)

    def gradients(self, layout: Layout, samples: Any = None) -> tuple[float, dict[str, torch.Tensor]]:
        parameters = self.adapter.named_parameters()
        for parameter in parameters.values():
            parameter.grad = None
        sums = self.runner.train(self.samples if samples is None else samples, layout, 0)
        return sums.loss, {
            name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None
        }

    def plain(self) -> tuple[float, dict[str, torch.Tensor]]:
        """Sample by sample through transformers' own forward, all logits, no packing."""
        parameters = self.adapter.named_parameters()
        for parameter in parameters.values():
            parameter.grad = None
        model: Any = self.loaded.model
        model.set_attn_implementation("eager")
        trained = sum(len(sample.targets) for sample in self.samples)
        total = 0.0
        for sample in self.samples:
            logits = model(torch.tensor(sample.ids, dtype=torch.int64).unsqueeze(0), use_cache=False).logits[0]
            loss = F.cross_entropy(
                logits[torch.from_numpy(sample.rows)].float(), torch.from_numpy(sample.targets), reduction="sum"
            )
            (loss / trained).backward()
            total += loss.item()
        model.set_attn_implementation("edgepeft_packed")
        return total, {
            name: parameter.grad.clone() for name, parameter in parameters.items() if parameter.grad is not None
        }


def assert_close(found: tuple[float, Any], expected: tuple[float, Any]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    assert expected[1]
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("checkpointing", ["none", "layer"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_layout_changes_nothing(tmp_path: Path, base: ModelEntry, checkpointing: Any, dropout: float) -> None:
    setup = Setup(tmp_path, base, method=LoraConfig(rank=4, dropout=dropout))
    assert len({len(sample.ids) for sample in setup.samples}) > 4
    whole = setup.gradients(Layout(micro_batch_tokens=10**6, checkpointing="none"))
    if not dropout:
        assert_close(whole, setup.plain())
    # 11 samples of unequal length: the last micro-batches are ragged.
    for cap in (1, 60, 97, 200):
        layout = Layout(micro_batch_tokens=cap, checkpointing=checkpointing, loss_chunk_tokens=1 + cap % 7)
        assert_close(setup.gradients(layout), whole)


def test_samples_do_not_see_each_other(tmp_path: Path, base: ModelEntry) -> None:
    setup = Setup(tmp_path, base)
    layout = Layout(micro_batch_tokens=10**6)
    alone = [setup.gradients(layout, [sample])[0] for sample in setup.samples]
    assert setup.gradients(layout)[0] == pytest.approx(sum(alone), rel=1e-5)


def test_evaluation_is_the_same_loss(tmp_path: Path, base: ModelEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(tmp_path, base)
    expected, _ = setup.plain()
    assert setup.runner.evaluate(setup.samples, LAYOUT).loss == pytest.approx(expected, rel=1e-5)
    # A packed row is split; a sample that is alone already has its loss taken in smaller chunks.
    for call, layout in ((1, LAYOUT), (0, Layout(micro_batch_tokens=1, loss_chunk_tokens=64))):
        fail_at(monkeypatch, {call})
        assert setup.runner.evaluate(setup.samples, layout).loss == pytest.approx(expected, rel=1e-5)
    fail_at(monkeypatch, set(range(1000)))
    with pytest.raises(OutOfMemory, match="held-out sample"):
        setup.runner.evaluate(setup.samples, LAYOUT)


def reference_run(entry: ModelEntry, plan: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """LoRA by PEFT, logits by transformers, one sample at a time, plain AdamW and clipping."""
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    recipe = plan.spec.recipe
    model = AutoModelForCausalLM.from_pretrained(entry.source, dtype=torch.float32)
    wrapped = get_peft_model(
        model, PeftLora(r=recipe.method.rank, lora_alpha=recipe.method.alpha, target_modules="all-linear")
    )
    parameters = {
        name.replace(".default", ""): value for name, value in wrapped.named_parameters() if value.requires_grad
    }
    ours = attach(load_model(entry, precision="fp32", compute_dtype="fp32", device=torch.device("cpu")), "a",
                  recipe.method, recipe.seed)  # fmt: skip
    with torch.no_grad():
        for name, value in ours.named_parameters().items():
            parameters[f"base_model.model.{name}"].copy_(value)
    settings = recipe.optimizer
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    table = prepare(recipe.data, Path(entry.folder)).train
    losses = []
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, plan.steps, settings, recipe.schedule)
        summed, count = torch.zeros(()), 0
        for index in step_samples(len(table), recipe.samples_per_step, step, recipe.seed):
            ids, mask = (torch.from_numpy(values.copy()) for values in table.sample(index))
            labels = torch.where(mask, ids.long(), -100)
            logits = wrapped(ids.long().unsqueeze(0)).logits[0]
            summed = summed + F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
            count += int((labels[1:] != -100).sum())
        loss = summed / count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: value.detach() for name, value in parameters.items()}


def test_six_steps_equal_a_plain_reference_loop(tmp_path: Path, base: ModelEntry) -> None:
    run = tiny_run(tmp_path, base)
    losses = [done.loss for done in of_type(train(run), StepDone)]
    expected, parameters = reference_run(base, run.read_plan())
    assert losses == pytest.approx(expected, rel=2e-4)
    assert losses[-1] < 0.8 * losses[0]
    for name, value in weights(run).items():
        torch.testing.assert_close(value, parameters[name], rtol=2e-2, atol=2e-4, msg=name)


def test_what_a_run_leaves_behind(tmp_path: Path, base: ModelEntry) -> None:
    run = tiny_run(tmp_path, base, eval_every_steps=3)
    events = train(run)
    (finished,) = of_type(events, Finished)
    assert finished.published == "tiny@v1"
    assert not finished.stopped
    assert finished.measured_peak_bytes > base.weights_bytes
    assert finished.tokens_per_second > 0
    assert [found.step for found in of_type(events, Evaluated)] == [0, 3, 6]
    assert of_type(events, Evaluated)[-1].best
    assert {found.phase for found in of_type(events, MemoryMeasured)} == {"load", "train step"}
    assert all(found.rss_bytes for found in of_type(events, MemoryMeasured))
    adapter = resolve_adapter("tiny@v1")
    assert adapter.card is not None
    assert adapter.card.base_fingerprint == base.fingerprint
    assert adapter.card.trainable_parameters == sum(math.prod(item.shape) for item in adapter.card.parameters)
    assert adapter.card.template is not None
    assert adapter.card.template.stop_token_ids
    assert adapter.card.metrics["eval_loss"] == finished.eval_loss
    # Six steps of five samples go once over all of them and begin anew.
    assert adapter.card.metrics["train_samples"] == 21
    assert {item.name for item in adapter.card.parameters} == weights(run).keys()
    second = train(tiny_run(tmp_path, base))
    assert of_type(second, Finished)[0].published == "tiny@v2"


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_stop_and_resume_is_bit_identical(tmp_path: Path, base: ModelEntry, dropout: float) -> None:
    options = {"method": LoraConfig(rank=4, dropout=dropout), "checkpoint_steps": 2}
    whole = tiny_run(tmp_path, base, "whole", **options)
    train(whole)
    parts = tiny_run(tmp_path, base, "parts", **options)
    for stop_at in (1, 4):
        events = train_until(parts, stop_at)
        (finished,) = of_type(events, Finished)
        assert (finished.stopped, finished.step, finished.published) == (True, stop_at, "")
        assert (parts.adapter / "card.json").is_file()
    events = train(parts)
    assert of_type(events, Started)[0].step == 4
    assert of_type(events, Finished)[0].published == "parts@v1"
    assert_same(weights(parts), weights(whole))


def train_until(run: RunFolder, step: int) -> list[Any]:
    """Asks to stop once `step` is done."""

    def stop(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == step:
            request(run, "stop")

    return train(run, stop)


def test_a_checkpoint_can_be_asked_for(tmp_path: Path, base: ModelEntry) -> None:
    run = tiny_run(tmp_path, base)
    request(run, "checkpoint")
    events = train(run)
    assert [saved.step for saved in of_type(events, CheckpointSaved)] == [1, 6]
    assert all((run.path / saved.path / "state.json").is_file() for saved in of_type(events, CheckpointSaved))


def test_a_bad_loss_is_skipped_and_told(tmp_path: Path, base: ModelEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    real, bad = step_module.summed_loss, 0

    def sometimes_nan(*arguments: Any) -> torch.Tensor:
        nonlocal bad
        bad -= 1
        return real(*arguments) * (math.nan if bad == 0 else 1.0)

    def first_step(event: Any) -> None:
        nonlocal bad
        if isinstance(event, PhaseChanged) and event.detail == "the first step":
            bad = 1

    monkeypatch.setattr(step_module, "summed_loss", sometimes_nan)
    run = tiny_run(tmp_path, base, max_steps=2)
    events = train(run, first_step)
    assert [found.step for found in of_type(events, Warned) if "not finite" in found.message] == [1]
    first, second = of_type(events, StepDone)
    assert math.isnan(first.loss)
    assert math.isfinite(second.loss)
    assert all(torch.isfinite(value).all() for value in weights(run).values())


def test_five_bad_steps_end_the_run_with_a_diagnosis(
    tmp_path: Path, base: ModelEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = step_module.summed_loss
    monkeypatch.setattr(step_module, "summed_loss", lambda *arguments: real(*arguments) * math.inf)
    with pytest.raises(EdgepeftError, match="learning rate"):
        train(tiny_run(tmp_path, base))
    watch = FiniteWatch()
    assert [watch.accepts(loss, 1.0) for loss in (math.nan, math.nan, 1.0, math.inf)] == [False, False, True, False]
    assert watch.in_a_row == 1


def test_a_step_without_anything_to_learn_changes_nothing(
    tmp_path: Path, base: ModelEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "read_samples", lambda table, indices: [])
    events = train(tiny_run(tmp_path, base, max_steps=2))
    assert [(done.trained_tokens, done.grad_norm) for done in of_type(events, StepDone)] == [(0, 0.0), (0, 0.0)]
    assert of_type(events, Finished)[0].train_loss is None


def test_a_token_without_embedding_is_refused_by_line(
    tmp_path: Path, base: ModelEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def beyond(table: Any, indices: Any) -> Any:
        return [sample._replace(ids=sample.ids + 200) for sample in read_samples(table, indices)]

    monkeypatch.setattr(reading, "read_samples", beyond)
    with pytest.raises(BadInput, match=r"line \d+ has token \d+, and the model has 260 embeddings"):
        train(tiny_run(tmp_path, base))


def test_stopped_in_the_last_evaluation_it_is_made_up_for(
    tmp_path: Path, base: ModelEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path, base, eval_every_steps=4)
    real = StepRunner.evaluate
    calls = 0

    def last_is_stopped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        # The first is the probe's, the second the base's, the third that of step 4.
        if calls == 4:
            raise StopRun
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(StepRunner, "evaluate", last_is_stopped)
        assert of_type(train(run), Finished)[0].stopped
    events = train(run)
    assert [found.step for found in of_type(events, Evaluated)] == [6]
    (finished,) = of_type(events, Finished)
    assert finished.published == "tiny@v1"
    assert finished.eval_loss == of_type(events, Evaluated)[0].loss


def test_a_kill_behind_publishing_makes_no_second_version(tmp_path: Path, base: ModelEntry) -> None:
    run = tiny_run(tmp_path, base)
    first = of_type(train(run), Finished)[0]
    # The process died before its last event could be written: it is resumed from the last checkpoint.
    assert of_type(train(run), Finished)[0].published == first.published == "tiny@v1"
    # Once the run is removed, the next of this name has its id, and is another one.
    shutil.rmtree(run.path)
    other = tiny_run(tmp_path, base, max_steps=3)
    assert other.id == run.id
    assert of_type(train(other), Finished)[0].published == "tiny@v2"


def test_another_base_is_refused(tmp_path: Path, base: ModelEntry) -> None:
    run = tiny_run(tmp_path, base)
    plan = run.plan_file.read_text()
    run.plan_file.write_text(plan.replace(base.fingerprint, "sha256:" + "0" * 64))
    with pytest.raises(BadInput, match="not the one that was planned with"):
        train(run)


def test_a_changed_recipe_is_refused_on_resume(tmp_path: Path, base: ModelEntry) -> None:
    run = tiny_run(tmp_path, base)
    train_until(run, 2)
    run.plan_file.write_text(run.plan_file.read_text().replace('"seed": 3', '"seed": 4'))
    with pytest.raises(BadInput, match="differs in seed"):
        train(run)


def test_changed_data_is_refused_though_its_tokens_are_cached(tmp_path: Path, base: ModelEntry) -> None:
    run = tiny_run(tmp_path, base)
    train_until(run, 2)
    data = tmp_path / "data.jsonl"
    content = data.read_text()
    data.write_text(content + content)
    with pytest.raises(BadInput, match=r"data\.jsonl: the training file has changed .* resume the run with --force"):
        train(run)
    data.unlink()
    with pytest.raises(BadInput, match=r"data\.jsonl: the training file is gone"):
        train(run)


@pytest.mark.parametrize("fate", ["changed", "gone"])
def test_forced_it_goes_on_with_the_tokens_as_they_were(tmp_path: Path, base: ModelEntry, fate: str) -> None:
    whole, run = tiny_run(tmp_path, base, "whole"), tiny_run(tmp_path, base, "forced")
    train(whole)
    train_until(run, 2)
    data = tmp_path / "data.jsonl"
    if fate == "changed":
        data.write_text(data.read_text() * 2)
    else:
        data.unlink()
    events = train(run, old_data=True)
    (told,) = (warning.message for warning in of_type(events, Warned))
    assert f"the training file {data} {'has changed' if fate == 'changed' else 'is gone'}" in told
    assert_same(weights(run), weights(whole))
    # Without the cache there is nothing to go on with, forced or not.
    shutil.rmtree(home().cache)
    other = tiny_run(tmp_path, base, "other", data=run.read_plan().spec.recipe.data)
    data.write_text("changed once more")
    with pytest.raises(BadInput, match="the cache does not hold its tokens"):
        train(other, old_data=True)


def test_another_tokenizer_or_template_is_refused_on_resume(tmp_path: Path, base: ModelEntry) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(CHATML)
    run = tiny_run(tmp_path, base, data=describe_data(write_data(tmp_path / "data.jsonl"), template=str(template)))
    train_until(run, 2)
    template.write_text(CHATML.replace("{{ message['content'] }}", " {{ message['content'] }}"))
    with pytest.raises(BadInput, match="the chat template has changed since the checkpoint"):
        train(run)
    template.write_text(CHATML)
    assert of_type(train(run), Finished)[0].published == "tiny@v1"


def test_a_changed_held_out_file_is_refused(tmp_path: Path, base: ModelEntry) -> None:
    held_out = write_data(tmp_path / "held-out.jsonl", 5)
    data = describe_data(write_data(tmp_path / "data.jsonl"), eval_path=held_out)
    run = tiny_run(tmp_path, base, data=data)
    held_out.write_text(held_out.read_text() * 2)
    with pytest.raises(BadInput, match=r"held-out\.jsonl: the held-out file has changed"):
        train(run)


def test_life_is_shown_before_the_first_step(tmp_path: Path, base: ModelEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_LIFE_SECONDS", 0.0)
    events = train(tiny_run(tmp_path, base, micro_batch_tokens=1))
    first = next(index for index, event in enumerate(events) if isinstance(event, StepDone))
    told = [event.detail for event in of_type(events[:first], PhaseChanged)]
    assert "trying the model on a few tokens" in told
    assert "first step, micro-batch 2" in told
    assert not any("micro-batch" in event.detail for event in of_type(events[first:], PhaseChanged))


def test_checkpointing_saves_memory(tmp_path: Path, base: ModelEntry) -> None:
    setup = Setup(tmp_path, base)
    peaks = []
    # What earlier tests left behind is not the run's.
    gc.collect()
    with LiveBytes(torch.device("cpu")) as counter:
        held = counter.live_bytes - setup.loaded.bytes_by_category()["frozen weights"]
    for mode in ("none", "layer"):
        setup.gauge.peak_bytes = 0
        layout = Layout(micro_batch_tokens=10**6, checkpointing=mode, loss_chunk_tokens=8)  # type: ignore[arg-type]
        setup.runner.train(setup.samples, layout, 0, watch_all=True)
        for parameter in setup.adapter.named_parameters().values():
            parameter.grad = None
        peaks.append(setup.gauge.peak_bytes - held)
    assert peaks[1] < 0.8 * peaks[0]
