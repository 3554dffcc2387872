"""Generation against transformers' own, on a tiny model, with and without an adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from edgepeft.chat.protocol import AdapterUse, Sampling
from edgepeft.engine.inference import generate as generate_module
from edgepeft.engine.inference.generate import generate, generate_batch
from edgepeft.engine.inference.score import score_losses
from edgepeft.engine.inference.session import Session
from edgepeft.engine.methods import attach, detach
from edgepeft.engine.methods.files import save_adapter
from edgepeft.engine.model.load import LoadedModel, load_model
from edgepeft.errors import BadInput, DoesNotFit, Interrupted, OutOfMemory
from edgepeft.methods import LoraConfig
from edgepeft.models.store import add_model

GREEDY = Sampling(temperature=0.0, max_new_tokens=24)
PROMPTS = [[256, 257, 40, 41, 42], [257, 70, 71, 72, 73, 74, 75, 76, 77, 78], [10, 20], [90, 91, 92, 93]]
STOPS = [258]


@pytest.fixture
def loaded(tiny_model: Path) -> LoadedModel:
    entry = add_model(tiny_model, "tiny")
    return load_model(entry, precision="fp32", compute_dtype="fp32", device=torch.device("cpu"))


@pytest.fixture
def session(loaded: LoadedModel) -> Session:
    return Session(loaded)


def make_adapter(loaded: LoadedModel, folder: Path, seed: int = 1) -> AdapterUse:
    """A random adapter that changes answers, saved as PEFT does."""
    adapter = attach(loaded, "made", LoraConfig(rank=4, alpha=8.0), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter.named_parameters().items():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    save_adapter(folder, adapter, "tiny")
    detach(loaded, "made")
    return AdapterUse(str(folder))


def reference(folder: Path, prompt: list[int], adapter: AdapterUse | None = None, tokens: int = 24) -> list[int]:
    """What transformers (and peft) answer."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter.folder)
    made = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=STOPS,
        pad_token_id=259,
    )
    answer: list[int] = made[0, len(prompt) :].tolist()
    return answer[: answer.index(258)] if 258 in answer else answer


def test_greedy_equals_transformers(session: Session, tiny_model: Path) -> None:
    for prompt in PROMPTS:
        seen: list[int] = []
        answer = generate(session, prompt, STOPS, GREEDY, seen.append)
        assert answer.ids == reference(tiny_model, prompt)
        assert seen == answer.ids
        assert answer.stopped_by == ("length" if len(answer.ids) == 24 else "stop")


def test_batch_of_unequal_prompts_equals_transformers(session: Session, tiny_model: Path) -> None:
    told: list[int] = []
    answers = generate_batch(session, PROMPTS, STOPS, GREEDY, 3, lambda index, _: told.append(index))
    assert [answer.ids for answer in answers] == [reference(tiny_model, prompt) for prompt in PROMPTS]
    assert sorted(told) == [0, 1, 2, 3]


def test_rows_that_end_early_leave_the_others_as_they_are(session: Session) -> None:
    alone = [generate(session, prompt, [], GREEDY).ids for prompt in PROMPTS]
    # Stopping at a token that only some answers contain early makes the rows end one by one.
    stop = alone[0][3]
    expected = [ids[: ids.index(stop)] if stop in ids else ids for ids in alone]
    assert len({len(ids) for ids in expected}) > 1
    answers = generate_batch(session, PROMPTS, [stop], GREEDY, 4)
    assert [answer.ids for answer in answers] == expected


def test_adapter_equals_peft_single_and_batched(session: Session, tiny_model: Path, tmp_path: Path) -> None:
    use = make_adapter(session.loaded, tmp_path / "adapter")
    base = [generate(session, prompt, STOPS, GREEDY).ids for prompt in PROMPTS]
    session.activate([use])
    expected = [reference(tiny_model, prompt, use) for prompt in PROMPTS]
    assert [generate(session, prompt, STOPS, GREEDY).ids for prompt in PROMPTS] == expected
    assert [answer.ids for answer in generate_batch(session, PROMPTS, STOPS, GREEDY)] == expected
    assert expected != base
    session.activate([])
    assert [generate(session, prompt, STOPS, GREEDY).ids for prompt in PROMPTS] == base


def test_swapping_reads_a_folder_once_and_again_when_it_changed(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_adapter(session.loaded, tmp_path / "a", 1)
    second = make_adapter(session.loaded, tmp_path / "b", 2)
    read: list[str] = []
    from edgepeft.engine.inference import residents

    real = residents.read_adapter
    monkeypatch.setattr(
        residents, "read_adapter", lambda folder, *rest: (read.append(folder.name), real(folder, *rest))[1]
    )
    answers = []
    for use in (first, second, first):
        session.activate([use])
        answers.append(generate(session, PROMPTS[0], [], GREEDY).ids)
    assert read == ["a", "b"]
    assert answers[0] == answers[2] != answers[1]
    make_adapter(session.loaded, tmp_path / "a", 2)
    session.activate([first])
    assert generate(session, PROMPTS[0], [], GREEDY).ids == answers[1]
    assert read == ["a", "b", "a"]


def test_strength_zero_is_the_base_and_halves_add_up(session: Session, tmp_path: Path) -> None:
    use = make_adapter(session.loaded, tmp_path / "a")
    base = generate(session, PROMPTS[0], [], GREEDY).ids
    session.activate([AdapterUse(use.folder, 0.0)])
    assert generate(session, PROMPTS[0], [], GREEDY).ids == base
    session.activate([use])
    whole = generate(session, PROMPTS[0], [], GREEDY).ids
    session.activate([AdapterUse(use.folder, 0.5), AdapterUse(use.folder, 0.5)])
    assert generate(session, PROMPTS[0], [], GREEDY).ids == whole != base


def test_missing_adapter_folder_is_named(session: Session, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nowhere"):
        session.activate([AdapterUse(str(tmp_path / "nowhere"))])


def test_next_turn_reuses_the_prefix_and_answers_as_if_fresh(loaded: LoadedModel, tmp_path: Path) -> None:
    session = Session(loaded)
    first = generate(session, PROMPTS[1], [], GREEDY)
    assert first.reused_tokens == 0
    longer = [*PROMPTS[1], *first.ids, 258, 10, 257, 66, 67]
    again = generate(session, longer, [], GREEDY)
    # All but the answer's last token, which was never fed back.
    assert again.reused_tokens == len(PROMPTS[1]) + len(first.ids) - 1
    assert again.ids == generate(Session(loaded), longer, [], GREEDY).ids
    other = [*PROMPTS[1][:4], 5, 6, 7]
    branched = generate(session, other, [], GREEDY)
    assert branched.reused_tokens == 4
    assert branched.ids == generate(Session(loaded), other, [], GREEDY).ids
    same = generate(session, other, [], GREEDY)
    assert same.reused_tokens == len(other) - 1
    assert same.ids == branched.ids
    session.activate([make_adapter(loaded, tmp_path / "a")])
    assert generate(session, other, [], GREEDY).reused_tokens == 0


def test_long_prompt_is_read_in_pieces(loaded: LoadedModel, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [(7 * index) % 250 for index in range(90)]
    monkeypatch.setattr(generate_module, "PREFILL_TOKENS", 16)
    expected = reference(tiny_model, prompt)
    assert generate(Session(loaded), prompt, STOPS, GREEDY).ids == expected
    answers = generate_batch(Session(loaded), [prompt, PROMPTS[0]], STOPS, GREEDY)
    assert answers[0].ids == expected
    assert answers[1].ids == reference(tiny_model, PROMPTS[0])


def test_cancel_is_seen_at_each_token(session: Session) -> None:
    seen: list[int] = []
    answer = generate(session, PROMPTS[0], [], GREEDY, seen.append, lambda: len(seen) >= 5)
    assert answer.stopped_by == "cancelled"
    assert len(answer.ids) == 5
    calls: Iterator[int] = iter(range(1000))
    answers = generate_batch(session, PROMPTS, [], GREEDY, 4, cancelled=lambda: next(calls) >= 4)
    assert {answer.stopped_by for answer in answers} == {"cancelled"}
    assert {len(answer.ids) for answer in answers} == {3}
    with pytest.raises(Interrupted):
        score_losses(session, [([1, 2], [True, True])], lambda: True)


def test_context_limit_ends_the_answer(session: Session) -> None:
    prompt = [3] * 500
    answer = generate(session, prompt, [], Sampling(temperature=0.0, max_new_tokens=100))
    assert answer.stopped_by == "context"
    assert len(prompt) + len(answer.ids) == 512
    (batched,) = generate_batch(session, [prompt], [], Sampling(temperature=0.0, max_new_tokens=100))
    assert (batched.stopped_by, batched.ids) == ("context", answer.ids)
    with pytest.raises(BadInput, match="512"):
        generate(session, [3] * 512, [], GREEDY)
    with pytest.raises(BadInput, match="empty"):
        generate(session, [], [], GREEDY)
    with pytest.raises(BadInput, match="does not know"):
        generate(session, [260], [], GREEDY)


def test_budget_bounds_the_cache(loaded: LoadedModel) -> None:
    base = Session(loaded).live_bytes
    token = 2 * 2 * 2 * 16 * 4
    session = Session(loaded, base + 20 * token)
    assert session.token_limit() == 20
    answer = generate(session, PROMPTS[0], [], GREEDY)
    assert answer.stopped_by == "context"
    assert len(PROMPTS[0]) + len(answer.ids) == 20
    with pytest.raises(DoesNotFit):
        generate(session, [3] * 20, [], GREEDY)
    with pytest.raises(DoesNotFit):
        Session(loaded, base - 1)


def test_batch_out_of_memory_halves_and_a_single_row_reports(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [answer.ids for answer in generate_batch(session, PROMPTS, [], GREEDY, 4)]
    real, widths = generate_module._forward, []

    def limited(session: Session, ids: torch.Tensor, *rest: object) -> torch.Tensor:
        widths.append(ids.shape[0])
        if ids.shape[0] > limit:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return real(session, ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(generate_module, "_forward", limited)
    limit = 2
    assert [answer.ids for answer in generate_batch(session, PROMPTS, [], GREEDY, 4)] == expected
    assert widths[0] == 4
    limit = 0
    with pytest.raises(OutOfMemory):
        generate_batch(session, PROMPTS, [], GREEDY, 4)
    with pytest.raises(OutOfMemory):
        generate(session, PROMPTS[0], [], GREEDY)


def test_another_runtime_error_is_not_called_memory(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(generate_module, "_forward", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        generate(session, PROMPTS[0], [], GREEDY)


def test_sampled_rows_do_not_depend_on_their_batch(session: Session) -> None:
    sampling = Sampling(temperature=1.0, seed=5, max_new_tokens=8)
    together = [answer.ids for answer in generate_batch(session, PROMPTS, [], sampling, 4)]
    apart = [answer.ids for answer in generate_batch(session, PROMPTS, [], sampling, 1)]
    assert together == apart


def test_losses_equal_transformers(session: Session, tiny_model: Path) -> None:
    samples = [(prompt, [index % 3 != 0 for index in range(len(prompt))]) for prompt in PROMPTS]
    samples.append(([5], [True]))
    losses, counts = score_losses(session, samples)
    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for (ids, mask), loss, count in zip(samples[:-1], losses, counts, strict=False):
        labels = torch.tensor([[token if trained else -100 for token, trained in zip(ids, mask, strict=True)]])
        expected = model(input_ids=torch.tensor([ids]), labels=labels).loss.item()
        assert count == sum(mask[1:])
        assert loss == pytest.approx(expected, abs=1e-5)
    assert counts[-1] == 0
    assert math.isnan(losses[-1])
    with pytest.raises(BadInput, match="513"):
        score_losses(session, [([1] * 513, [True] * 513)])
