"""Tokens that the base never learned: refused before the first step, unless the method trains the embedding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgepeft.data.token_table import TokenFile, TokenTable, TokenWriter
from edgepeft.engine.training.vocabulary import NEAR_MEAN, never_trained
from edgepeft.errors import BadInput
from edgepeft.methods import FullConfig, LoraConfig
from edgepeft.methods.prompt import PromptConfig
from edgepeft.models.store import ModelEntry, add_model
from edgepeft.runs.events import Finished, PhaseChanged, StepDone, Warned
from tiny import write_tiny_model
from training_runs import of_type, tiny_run, train

IM_START, IM_END, PAD = 257, 258, 259


def base_with(folder: Path, change: Callable[[Tensor], object]) -> ModelEntry:
    """A tiny model with another embedding."""
    write_tiny_model(folder)
    weights = load_file(folder / "model.safetensors")
    change(weights["model.embed_tokens.weight"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return add_model(folder)


def told_of(events: list[Any]) -> list[str]:
    return [event.message for event in of_type(events, Warned) if "never trained" in event.message]


def zero(table: Tensor) -> None:
    table[IM_END] = 0


def twins(table: Tensor) -> None:
    # The other one is in no data.
    table[IM_START] = table[PAD]


def near_mean(table: Tensor) -> None:
    # What transformers' resize_token_embeddings draws.
    old = table[[token for token in range(260) if token not in (IM_START, IM_END)]]
    mean, spread = old.mean(0), old.std(0)
    noise = torch.randn(2, table.shape[1], generator=torch.Generator().manual_seed(0))
    table[IM_START : IM_END + 1] = mean + 3e-5 * spread * noise


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (zero, r"an added token whose embedding was never trained: '<\|im_end\|>'\. Train it with"),
        (twins, r"an added token .* '<\|im_start\|>'\. Train it with"),
        (near_mean, r"added tokens .* '<\|im_start\|>', '<\|im_end\|>'\. Train them with"),
    ],
)
@pytest.mark.parametrize("config", [LoraConfig(rank=4), LoraConfig(rank=4, targets=("lm_head",)), PromptConfig(4)])
def test_added_tokens_that_were_never_trained_are_refused(tmp_path: Path, change: Any, told: str, config: Any) -> None:
    base = base_with(tmp_path / "model", change)
    run, events = tiny_run(tmp_path, base, method=config), []
    with pytest.raises(BadInput, match=told) as caught:
        train(run, events.append)
    message = str(caught.value)
    assert "--set targets=all-linear,embed_tokens,lm_head, or use --method full" in message
    assert message.startswith(str(tmp_path / "data.jsonl"))
    assert "\n" not in message
    assert not of_type(events, StepDone)


@pytest.mark.parametrize(
    "config", [LoraConfig(rank=4, targets=("all-linear", "embed_tokens", "lm_head")), FullConfig()]
)
def test_a_method_that_trains_the_embedding_takes_them(tmp_path: Path, config: Any) -> None:
    base = base_with(tmp_path / "model", zero)
    events = train(tiny_run(tmp_path, base, method=config, max_steps=2))
    assert of_type(events, Finished)
    assert not told_of(events)


def test_an_ordinary_token_that_was_never_trained_is_told_of(tmp_path: Path) -> None:
    def change(table: Tensor) -> None:
        table[ord("7") - ord("!")] = 0

    base = base_with(tmp_path / "model", change)
    events = train(tiny_run(tmp_path, base, max_steps=1))
    assert told_of(events) == ["the data uses tokens whose embedding was never trained: '7'"]


def test_a_tiny_random_model_has_none(tmp_path: Path) -> None:
    events = train(tiny_run(tmp_path, add_model(write_tiny_model(tmp_path / "model")), max_steps=1))
    assert not told_of(events)


def test_a_token_without_an_embedding_is_refused_before_the_first_step(tmp_path: Path) -> None:
    base = add_model(write_tiny_model(tmp_path / "model", vocab_size=258, pad_token_id=None))
    events: list[Any] = []
    for config in (LoraConfig(rank=4), LoraConfig(rank=4, targets=("embed_tokens",))):
        run = tiny_run(tmp_path, base, method=config)
        with pytest.raises(BadInput, match=r"token 258, '<\|im_end\|>', and the model has 258 embeddings"):
            train(run, events.append)
    assert not any(isinstance(event, PhaseChanged) and event.name == "train" for event in events)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_were_only_initialised_are_found(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(1)
    table = torch.randn(3000, 48, generator=random) * 0.3 + torch.randn(48, generator=random) * 0.2
    added = [5, 1000, 2990]
    table[7] = 0
    table[[9, 2000]] = table[11].clone()
    # Of a token that training hardly met.
    table[13] = table.mean(0) + 3 * NEAR_MEAN * table.std(0)
    old = table[[row for row in range(3000) if row not in added]]
    table[added] = old.mean(0) + 3e-5 * old.std(0) * torch.randn(3, 48, generator=random)
    found = never_trained(table.to(dtype), torch.arange(3000))
    assert found.nonzero().flatten().tolist() == [5, 7, 9, 11, 1000, 2000, 2990]
    assert never_trained(table.to(dtype), torch.tensor([2000, 13, 7, 14])).tolist() == [True, False, True, False]


def test_the_tokens_of_a_table_are_those_that_are_trained_on(tmp_path: Path) -> None:
    writer = TokenWriter(tmp_path / "tokens.arrow")
    samples = [
        ([1, 2, 3, 4, 50], [False, False, True, True, False]),  # 50 follows the last trained one
        ([5, 6, 70, 80], [False, True, False, False]),
        ([90, 91], [False, False]),  # nothing is trained
        ([7, 8, 9, 60], [False, True, True, True]),
    ]
    for line, (ids, mask) in enumerate(samples):
        writer.add(ids, mask, line)
    writer.close(keep=True)
    file = TokenFile(tmp_path / "tokens.arrow")
    table = TokenTable(file, np.arange(4))
    assert table.tokens().tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 60]
    assert table.limited(3, "truncate").tokens().tolist() == [1, 2, 3, 5, 6, 7, 8, 9]
    assert TokenTable(file, np.array([1, 2])).tokens().tolist() == [5, 6]
    assert TokenTable(file, np.array([2])).tokens().tolist() == []
