"""Models of other families than Llama: what transformers computes, the engine computes too, in chat and in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from edgepeft.chat.protocol import Sampling
from edgepeft.engine.inference.generate import generate, generate_batch
from edgepeft.engine.inference.session import Session
from edgepeft.engine.methods import attach, set_active
from edgepeft.engine.model.load import LoadedModel, load_model
from edgepeft.engine.training.batches import Sample
from edgepeft.engine.training.memory import MemoryGauge
from edgepeft.engine.training.step import StepRunner
from edgepeft.errors import UsageError
from edgepeft.methods import LoraConfig
from edgepeft.methods.prefix import PrefixConfig
from edgepeft.methods.prompt import PromptConfig
from edgepeft.models.store import ensure_model
from edgepeft.spec import BaseRef, DataRef, Layout, Recipe
from tiny import write_tokenizer

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 272,  # the tokenizer has 260: rows beyond it are padding
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 256,
    "eos_token_id": 258,
}
HEADS = {"head_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": HEADS,
    "mistral": HEADS | {"sliding_window": 6},
    "gemma2": HEADS | {"sliding_window": 6, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": HEADS | {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "phi3": {"sliding_window": 6},
    "olmo2": {},
    "granite": {"logits_scaling": 4.0},
    "cohere2": HEADS | {"sliding_window": 6},
}
PROMPTS = [[256, 257, 40, 41, 42], list(range(40, 60)), [10, 20]]
GREEDY = Sampling(temperature=0.0, max_new_tokens=12)


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model whose biases and norms are not what they are initialised with, and whose answers vary."""
    torch.manual_seed(1)
    kind: str = request.param
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON, **FAMILIES[kind]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(3 if "embed" in name else 6)
            else:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    model.save_pretrained(tmp_path / kind)
    write_tokenizer(tmp_path / kind)
    return tmp_path / kind


def load(folder: Path) -> LoadedModel:
    entry = ensure_model(str(folder))
    return load_model(entry, precision="fp32", compute_dtype="fp32", device=torch.device("cpu"))


@torch.no_grad()
def answer(model: Any, prompt: list[int]) -> list[int]:
    """The likeliest tokens by transformers, without a cache."""
    ids = list(prompt)
    for _ in range(GREEDY.max_new_tokens):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_answers_are_transformers(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    expected = [answer(model, prompt) for prompt in PROMPTS]
    assert len(set(expected[1])) > 2
    session = Session(load(folder))
    assert [generate(session, prompt, [], GREEDY).ids for prompt in PROMPTS] == expected
    assert [made.ids for made in generate_batch(session, PROMPTS, [], GREEDY, 3)] == expected
    # The next turn reuses the cache, beyond every sliding window.
    first = generate(session, PROMPTS[1], [], GREEDY)
    longer = [*PROMPTS[1], *first.ids, 7, 8, 9]
    again = generate(session, longer, [], GREEDY)
    assert again.reused_tokens == len(PROMPTS[1]) + len(first.ids) - 1
    assert again.ids == answer(model, longer)


@pytest.mark.parametrize(
    "config", [LoraConfig(rank=4, alpha=8.0), PrefixConfig(4), PromptConfig(4)], ids=["lora", "prefix", "prompt"]
)
def test_packed_gradients_are_those_of_each_sample_by_itself(folder: Path, config: Any) -> None:
    loaded = load(folder)
    if folder.name == "cohere2" and isinstance(config, PrefixConfig):
        with pytest.raises(UsageError, match="cohere2"):
            attach(loaded, "a", config, seed=0)
        return
    adapter = attach(loaded, "a", config, seed=0)
    set_active(loaded, [("a", 1.0)])
    torch.manual_seed(2)
    parameters = adapter.named_parameters()
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += torch.randn(parameter.shape) * 0.02
    samples = []
    for number, length in enumerate((11, 3, 19)):
        ids = torch.randint(0, 256, (length,), dtype=torch.int32).numpy()
        rows = torch.arange(length - 1).numpy()
        samples.append(Sample(number, ids[:-1], rows, ids[1:].astype("int64")))
    trained = sum(len(sample.targets) for sample in samples)
    model: Any = loaded.model
    model.set_attn_implementation("eager")
    total = 0.0
    for sample in samples:
        logits = model(torch.from_numpy(sample.ids).long()[None], use_cache=False).logits[0]
        loss = F.cross_entropy(logits.float(), torch.from_numpy(sample.targets), reduction="sum")
        (loss / trained).backward()
        total += loss.item()
    expected = {}
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        expected[name], parameter.grad = parameter.grad, None
    recipe = Recipe(
        base=BaseRef(model="m", fingerprint="sha256:1", architecture="-"),
        data=DataRef(path="/d", fingerprint="sha256:2", format="text"),
        method=LoraConfig(),
        precision="fp32",
        compute_dtype="fp32",
        max_seq_len=64,
        samples_per_step=3,
    )
    runner = StepRunner(loaded, recipe, backward=lambda loss: loss.backward(), gauge=MemoryGauge(torch.device("cpu")))
    runner.check()
    # Rows that the method fills come first.
    lead = loaded.prompt.tokens
    samples = [sample._replace(ids=np.pad(sample.ids, (lead, 0)), rows=sample.rows + lead) for sample in samples]
    sums = runner.train(samples, Layout(micro_batch_tokens=64, loss_chunk_tokens=5), 0)
    assert sums.loss == pytest.approx(total, rel=1e-5)
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)


@pytest.mark.parametrize("config", [PrefixConfig(4), PromptConfig(4)], ids=["prefix", "prompt"])
def test_padding_changes_no_answer_behind_what_stands_first(folder: Path, config: Any) -> None:
    if folder.name == "cohere2" and isinstance(config, PrefixConfig):
        pytest.skip("it takes no prefix")
    loaded = load(folder)
    attach(loaded, "a", config, seed=0)
    set_active(loaded, [("a", 1.0)])
    session = Session(loaded)
    prompts = [*PROMPTS, list(range(90, 110))]
    alone = [generate(session, prompt, [], GREEDY).ids for prompt in prompts]
    assert [made.ids for made in generate_batch(session, prompts, [], GREEDY, 4)] == alone
