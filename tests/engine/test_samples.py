"""Answers while a run trains: right, harmless to training, and never the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from edgepeft.chat.protocol import AdapterUse, Sampling
from edgepeft.chat.setup import choose_prompting, encode_conversation
from edgepeft.data.prepare import describe_data
from edgepeft.engine.inference.generate import generate
from edgepeft.engine.inference.session import Session
from edgepeft.engine.model.load import load_model
from edgepeft.engine.training import samples as samples_module
from edgepeft.engine.training.attention import PACKED
from edgepeft.engine.training.samples import Samples
from edgepeft.engine.training.stopping import StopRun
from edgepeft.errors import BadInput
from edgepeft.methods import LoraConfig
from edgepeft.models.store import ModelEntry
from edgepeft.runs.control import request
from edgepeft.runs.events import Finished, OutOfMemoryHit, PhaseChanged, SampleGenerated, StepDone, Warned
from edgepeft.runs.layout import RunFolder
from edgepeft.spec import Optimizer
from out_of_memory import allocator_error
from training_runs import of_type, tiny_base, tiny_run, train

PROMPTS = ("Count to 5", "Count to 2 [and] stop")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture
def base(tmp_path: Path) -> ModelEntry:
    return tiny_base(tmp_path)


def same_adapter(one: RunFolder, other: RunFolder) -> bool:
    found, expected = (load_file(run.adapter / "adapter_model.safetensors") for run in (one, other))
    return found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
@pytest.mark.parametrize("checkpointing", ["layer", "none"])
def test_training_goes_on_as_if_nothing_had_been_said(
    tmp_path: Path, base: ModelEntry, precision: str, checkpointing: str
) -> None:
    options: dict[str, Any] = {
        "eval_every_steps": 2,
        "precision": precision,
        "checkpointing": checkpointing,
        "method": LoraConfig(rank=4, alpha=8.0, dropout=0.2),
    }
    silent = tiny_run(tmp_path, base, "silent", **options)
    losses = [done.loss for done in of_type(train(silent), StepDone)]
    run = tiny_run(tmp_path, base, "talking", sample_prompts=PROMPTS, **options)
    drawn = torch.get_rng_state()
    events = train(run)
    assert torch.equal(torch.get_rng_state(), drawn)
    found = of_type(events, SampleGenerated)
    assert [(one.step, one.prompt) for one in found] == [(step, prompt) for step in (0, 2, 4, 6) for prompt in PROMPTS]
    assert [done.loss for done in of_type(events, StepDone)] == losses
    assert same_adapter(run, silent)
    # Each evaluation ends with the answers.
    assert of_type(events, PhaseChanged)[-1].name == "save"


def test_they_are_what_a_chat_answers(tmp_path: Path, base: ModelEntry) -> None:
    run = tiny_run(tmp_path, base, max_steps=12, sample_prompts=PROMPTS, optimizer=Optimizer(learning_rate=2e-2))
    events = train(run)
    loaded = load_model(base, precision="fp32", compute_dtype="fp32", device=torch.device("cpu"))
    session, prompting = Session(loaded), choose_prompting(base, [])
    greedy = Sampling(temperature=0.0, max_new_tokens=64, seed=0)

    def answers(*uses: AdapterUse) -> list[str]:
        session.activate(uses)
        found = []
        for prompt in PROMPTS:
            ids = encode_conversation([{"role": "user", "content": prompt}], prompting)
            made = generate(session, ids, prompting.stop_ids, greedy)
            found.append(prompting.tokenizer.decode(made.ids, skip_special_tokens=True).strip())
        return found

    told = [one.answer for one in of_type(events, SampleGenerated)]
    assert told[:2] == answers()
    assert told[2:] == answers(AdapterUse(str(run.adapter), 1.0))
    assert told[:2] != told[2:]


def test_without_anything_held_out_they_follow_the_same_steps(tmp_path: Path, base: ModelEntry) -> None:
    data = describe_data(tmp_path / "data.jsonl", eval_fraction=0.0) if (tmp_path / "data.jsonl").exists() else None
    if data is None:
        tiny_run(tmp_path, base, "first")
        data = describe_data(tmp_path / "data.jsonl", eval_fraction=0.0)
    run = tiny_run(tmp_path, base, data=data, eval_every_steps=4, sample_prompts=PROMPTS[:1])
    assert [one.step for one in of_type(train(run), SampleGenerated)] == [0, 4, 6]


def test_plain_text_is_gone_on_with(tmp_path: Path, base: ModelEntry) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(f'{{"text": "{n} {n} {n} {n}"}}\n' for n in range(20)))
    run = tiny_run(tmp_path, base, data=describe_data(path, eval_fraction=0.2), sample_prompts=("7 7",))
    assert len(of_type(train(run), SampleGenerated)) == 2


@pytest.mark.parametrize(
    "trouble",
    [lambda: BadInput("the prompt is empty"), lambda: allocator_error(), lambda: torch.OutOfMemoryError("CUDA")],
)
def test_what_cannot_be_answered_costs_the_answer_only(
    tmp_path: Path, base: ModelEntry, monkeypatch: pytest.MonkeyPatch, trouble: Any
) -> None:
    silent = tiny_run(tmp_path, base, "silent", eval_every_steps=2)
    train(silent)
    real = samples_module.generate

    def sometimes(session: Any, ids: list[int], *arguments: Any, **options: Any) -> Any:
        if len(ids) < 40:
            raise trouble()
        return real(session, ids, *arguments, **options)

    monkeypatch.setattr(samples_module, "generate", sometimes)
    prompts = ("short", "a prompt that is long enough to be answered, as it has many letters")
    run = tiny_run(tmp_path, base, eval_every_steps=2, sample_prompts=prompts)
    events = train(run)
    assert {one.prompt for one in of_type(events, SampleGenerated)} == {prompts[1]}
    # Told once, and not tried again.
    (warning,) = (found for found in of_type(events, Warned) if "left out" in found.message)
    assert "'short'" in warning.message
    assert not of_type(events, OutOfMemoryHit)
    assert of_type(events, Finished)[0].published
    assert same_adapter(run, silent)


def test_a_prompt_beyond_the_context_is_left_out(tmp_path: Path, base: ModelEntry) -> None:
    events = train(tiny_run(tmp_path, base, sample_prompts=("x" * 600,)))
    assert any("the model takes 512" in warning.message for warning in of_type(events, Warned))
    assert of_type(events, Finished)


def test_the_budget_holds_for_answers_too(tmp_path: Path, base: ModelEntry) -> None:
    options: dict[str, Any] = {"micro_batch_tokens": 60, "max_steps": 2}
    silent = tiny_run(tmp_path, base, "silent", **options)
    peak = of_type(train(silent), Finished)[0].measured_peak_bytes
    run = tiny_run(tmp_path, base, "talking", budget_bytes=peak, sample_prompts=("y" * 440,), **options)
    events = train(run)
    (finished,) = of_type(events, Finished)
    assert finished.measured_peak_bytes <= peak
    assert any("left out" in warning.message for warning in of_type(events, Warned))
    assert not of_type(events, OutOfMemoryHit)
    assert same_adapter(run, silent)


def test_a_stop_is_obeyed_in_the_middle_of_an_answer(tmp_path: Path, base: ModelEntry) -> None:
    whole = tiny_run(tmp_path, base, "whole", eval_every_steps=2, sample_prompts=PROMPTS)
    train(whole)
    run = tiny_run(tmp_path, base, "parts", eval_every_steps=2, sample_prompts=PROMPTS)

    def stop(event: Any) -> None:
        if isinstance(event, SampleGenerated) and event.step == 4:
            request(run, "stop")

    events = train(run, stop)
    (finished,) = of_type(events, Finished)
    assert (finished.stopped, finished.step) == (True, 4)
    assert [one.step for one in of_type(events, SampleGenerated)] == [0, 0, 2, 2, 4]
    train(run)
    assert same_adapter(run, whole)


def test_the_attention_of_training_comes_back_whatever_happens(tmp_path: Path, base: ModelEntry) -> None:
    from edgepeft.engine.training.memory import MemoryGauge
    from edgepeft.engine.training.step import use_packed_attention

    loaded = load_model(base, precision="fp32", compute_dtype="fp32", device=torch.device("cpu"))
    run = tiny_run(tmp_path, base)

    def leave() -> None:
        raise StopRun

    told: list[Any] = []
    gauge = MemoryGauge(torch.device("cpu"))
    samples = Samples(loaded, run.read_plan().spec.recipe.data, PROMPTS, gauge, leave, told.append)
    use_packed_attention(loaded.model)
    with pytest.raises(StopRun):
        samples.answer(3)
    config: Any = loaded.model.config
    assert config._attn_implementation == PACKED
    assert not of_type(told, SampleGenerated)
