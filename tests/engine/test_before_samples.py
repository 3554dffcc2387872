"""What stands before every sample, keys and values or embeddings: packed rows, conversations, batches, context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM

from edgepeft.chat.protocol import AdapterUse, Sampling
from edgepeft.data.token_table import TokenFile, TokenTable, TokenWriter
from edgepeft.data.tokens import Tokenizer
from edgepeft.engine.inference.generate import generate, generate_batch
from edgepeft.engine.inference.score import score_losses
from edgepeft.engine.inference.session import Session
from edgepeft.engine.methods import attach, detach, set_active
from edgepeft.engine.methods.files import read_adapter, save_adapter
from edgepeft.engine.model.load import LoadedModel, load_model
from edgepeft.engine.training.batches import Sample
from edgepeft.engine.training.memory import MemoryGauge
from edgepeft.engine.training.reading import SampleReader
from edgepeft.engine.training.step import StepRunner
from edgepeft.errors import BadInput, UsageError
from edgepeft.library.peft_config import leading_tokens
from edgepeft.library.store import WEIGHTS_FILE, open_adapter
from edgepeft.methods.prefix import PrefixConfig
from edgepeft.methods.prompt import PromptConfig
from edgepeft.models.store import ensure_model
from edgepeft.plan.lengths import SampleLengths
from edgepeft.spec import Layout
from tiny import write_tiny_model
from training_runs import tiny_base, tiny_plan

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0.0, max_new_tokens=16)
PROMPTS = [[256, 257, 40, 41, 42], [257, 70, 71, 72, 73, 74, 75, 76, 77, 78], [10, 20], [90, 91, 92, 93]]
STOPS = [258]
KINDS: dict[str, Any] = {"prefix": PrefixConfig, "prompt": PromptConfig}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def kind(request: pytest.FixtureRequest) -> Any:
    """The type of the method's config."""
    return request.param


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a model whose head is no copy of its embedding: it does not only repeat itself."""
    return write_tiny_model(tmp_path / "model", tie_word_embeddings=False)


@pytest.fixture
def loaded(folder: Path) -> LoadedModel:
    return load_model(ensure_model(str(folder)), precision="fp32", compute_dtype="fp32", device=CPU)


def made(loaded: LoadedModel, folder: Path, kind: Any, tokens: int = 6, seed: int = 1) -> AdapterUse:
    """A random one that changes answers, as PEFT saves it."""
    adapter = attach(loaded, "made", kind(tokens), seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.named_parameters().values():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 4
    save_adapter(folder, adapter, "tiny")
    detach(loaded, "made")
    return AdapterUse(str(folder))


def theirs(folder: Path, adapter: AdapterUse) -> Any:
    return PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), adapter.folder)


def answered(model: Any, prompt: list[int]) -> list[int]:
    """What peft answers, token by token without a cache of its own: its prefix is the beginning of one each time."""
    ids: list[int] = []
    for _ in range(GREEDY.max_new_tokens):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([prompt + ids])).logits[0, -1].argmax())
        if token in STOPS:
            break
        ids.append(token)
    return ids


def test_training_on_packed_rows_has_the_loss_and_gradients_of_peft(tmp_path: Path, kind: Any) -> None:
    entry = ensure_model(str(write_tiny_model(tmp_path / "model", seed=3)))
    loaded = load_model(entry, precision="fp32", compute_dtype="fp32", device=CPU)
    use = made(loaded, tmp_path / "a", kind)
    adapter = read_adapter(Path(use.folder), loaded, "a")
    set_active(loaded, [("a", 1.0)])
    runner = StepRunner(
        loaded, tiny_plan(tmp_path, entry).spec.recipe, backward=lambda loss: loss.backward(), gauge=MemoryGauge(CPU)
    )
    random = torch.Generator().manual_seed(2)
    sequences = [torch.randint(0, 250, (length + 1,), generator=random) for length in (23, 9, 31, 5)]
    lead = loaded.prompt.tokens
    assert lead == (6 if kind is PromptConfig else 0)
    samples = [
        Sample(
            number,
            np.pad(ids[:-1].int().numpy(), (lead, 0)),
            lead + torch.arange(len(ids) - 1).numpy(),
            ids[1:].numpy(),
        )
        for number, ids in enumerate(sequences)
    ]
    sums = runner.train(samples, Layout(512, "layer", 64), 0)
    # peft loads these only to use them: a fresh one is given the values.
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    settings: Any = {PrefixConfig: PrefixTuningConfig, PromptConfig: PromptTuningConfig}[kind]
    twin: Any = get_peft_model(base, settings(task_type="CAUSAL_LM", num_virtual_tokens=6))
    values = load_file(tmp_path / "a" / WEIGHTS_FILE)["prompt_embeddings"]
    twin.prompt_encoder["default"].embedding.weight.data.copy_(values)
    total = torch.zeros(())
    for ids in sequences:
        logits = twin(input_ids=ids[None, :-1]).logits[0, 1 - len(ids) :]
        total = total + torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
    (total / sums.trained_tokens).backward()
    assert sums.loss == pytest.approx(float(total), rel=1e-5)
    (wanted,) = (value.grad for value in twin.parameters() if value.grad is not None)
    found = torch.cat(
        [value.grad.flatten(1) for value in adapter.named_parameters().values() if value.grad is not None], 1
    )
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    assert runner.evaluate(samples, Layout(40, "none", 16)).loss == pytest.approx(sums.loss, rel=1e-5)


def test_answers_are_those_of_peft_alone_and_in_a_padded_batch(
    loaded: LoadedModel, folder: Path, tmp_path: Path, kind: Any
) -> None:
    session, use = Session(loaded), made(loaded, tmp_path / "a", kind)
    base = [generate(session, prompt, STOPS, GREEDY).ids for prompt in PROMPTS]
    session.activate([use])
    twin = theirs(folder, use)
    expected = [answered(twin, prompt) for prompt in PROMPTS]
    assert [generate(session, prompt, STOPS, GREEDY).ids for prompt in PROMPTS] == expected != base
    assert [answer.ids for answer in generate_batch(session, PROMPTS, STOPS, GREEDY)] == expected
    session.activate([AdapterUse(use.folder, 0.0)])
    assert [generate(session, prompt, STOPS, GREEDY).ids for prompt in PROMPTS] == base


def test_losses_are_those_of_peft(loaded: LoadedModel, folder: Path, tmp_path: Path, kind: Any) -> None:
    session, use = Session(loaded), made(loaded, tmp_path / "a", kind)
    session.activate([use])
    losses, _ = score_losses(session, [(ids, [True] * len(ids)) for ids in PROMPTS])
    twin = theirs(folder, use)
    for ids, loss in zip(PROMPTS, losses, strict=True):
        with torch.no_grad():
            logits = twin(input_ids=torch.tensor([ids])).logits[0, -len(ids) : -1]
        assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]))), abs=1e-5)


def test_the_next_turn_reuses_its_tokens_behind_the_prefix(loaded: LoadedModel, tmp_path: Path, kind: Any) -> None:
    session, use = Session(loaded), made(loaded, tmp_path / "a", kind)
    session.activate([use])
    first = generate(session, PROMPTS[1], [], GREEDY)
    longer = [*PROMPTS[1], *first.ids, 258, 10, 257, 66, 67]
    again = generate(session, longer, [], GREEDY)
    assert again.reused_tokens == len(PROMPTS[1]) + len(first.ids) - 1
    session.prefix = None
    assert again.ids == generate(session, longer, [], GREEDY).ids
    session.activate([made(loaded, tmp_path / "b", kind, seed=2)])
    assert generate(session, longer, [], GREEDY).reused_tokens == 0


def test_the_context_and_the_budget_have_room_for_what_is_left(loaded: LoadedModel, tmp_path: Path, kind: Any) -> None:
    session = Session(loaded)
    session.activate([made(loaded, tmp_path / "a", kind, tokens=100)])
    assert session.token_limit() == 412
    assert leading_tokens(open_adapter(tmp_path / "a").config) == 100
    answer = generate(session, [3] * 405, [], GREEDY)
    assert (answer.stopped_by, len(answer.ids)) == ("context", 7)
    with pytest.raises(BadInput, match="takes 412"):
        generate(session, [3] * 412, [], GREEDY)
    with pytest.raises(BadInput, match="takes 412"):
        score_losses(session, [([3] * 413, [True] * 413)])
    small = Session(loaded, session.live_bytes + 130 * session.cache_token_bytes)
    assert small.token_limit() == 30


def test_embeddings_stand_behind_keys_and_one_after_another(loaded: LoadedModel, folder: Path) -> None:
    prefix = attach(loaded, "a", PrefixConfig(4), seed=1)
    first, second = (attach(loaded, name, PromptConfig(count), seed=2) for name, count in (("b", 3), ("c", 2)))
    set_active(loaded, [("b", 1.0), ("a", 1.0), ("c", 0.5)])
    assert (loaded.leading_tokens, loaded.prefix_tokens) == (9, 4)
    cache = DynamicCache()
    for layer, update in enumerate(prefix.updates.values()):
        cache.update(*(x.transpose(0, 1)[None] for x in update.named_tensors().values()), layer)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([PROMPTS[1]])
    rows = [next(iter(adapter.named_parameters().values())) for adapter in (first, second)]
    own = model.get_input_embeddings()(ids)
    with torch.no_grad():
        embeddings = torch.cat([rows[0][None], 0.5 * rows[1][None], own], dim=1)
        expected = model(inputs_embeds=embeddings, past_key_values=cache).logits[:, 5:]
        torch.testing.assert_close(loaded.model(ids).logits, expected, rtol=1e-5, atol=1e-5)
        positions = torch.arange(ids.shape[1])[None]
        found = loaded.model(ids, attention_mask=torch.ones_like(ids), position_ids=positions).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", ["text", "vocabulary", "random"])
def test_where_a_prompt_starts(loaded: LoadedModel, start: Any) -> None:
    adapter = attach(loaded, "a", PromptConfig(7, start, "Hi!" if start == "text" else ""), seed=1)
    (rows,) = adapter.named_parameters().values()
    table = loaded.model.get_input_embeddings().weight
    found = [[number for number, known in enumerate(table) if torch.equal(known, row)] for row in rows.detach()]
    if start == "text":
        tokenizer = Tokenizer.load(Path(loaded.entry.folder))
        assert [ids[0] for ids in found] == (tokenizer.encode("Hi!") * 3)[:7]
    else:
        assert all(len(ids) == (1 if start == "vocabulary" else 0) for ids in found)
    again = attach(loaded, "b", PromptConfig(7, start, "Hi!" if start == "text" else ""), seed=1)
    assert all(map(torch.equal, adapter.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "0 tokens is not possible"),
        ({"text": "Sort the alerts."}, "starts at vocabulary has no text"),
        ({"start": "text"}, "no text to start at"),
        ({"start": "text", "text": "  "}, "no text to start at"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PromptConfig(**settings)


def test_rows_before_samples_are_read_as_they_are_planned(tmp_path: Path) -> None:
    writer = TokenWriter(tmp_path / "tokens.arrow")
    for line, length in enumerate((9, 4, 12)):
        writer.add(list(range(length)), [False, False, *([line != 1] * (length - 2))], line)
    writer.close(keep=True)
    table = TokenTable(TokenFile(tmp_path / "tokens.arrow"), np.arange(3, dtype=np.int64))
    plain, led = SampleReader(table, 260, "f"), SampleReader(table, 260, "f", leading_rows=lambda: 5)
    assert led.trainable()[0].tolist() == [13, 0, 16]
    for one, other in zip(plain.read([0, 1, 2]), led.read([0, 1, 2]), strict=True):
        assert other.ids.tolist() == [0] * 5 + one.ids.tolist()
        assert other.rows.tolist() == [row + 5 for row in one.rows]
        assert (other.number, other.targets.tolist()) == (one.number, one.targets.tolist())
    spec = tiny_plan(tmp_path, tiny_base(tmp_path), method=PromptConfig(5)).spec
    lengths = SampleLengths(table, table)
    assert lengths.held_out(spec.recipe)[0].tolist() == [13, 0, 16]
    assert lengths.longest_computed(8, 5) == 13
    assert lengths.bound(spec).longest == 16
