"""Prefix tuning where it meets attention, cache and context: packed rows, conversations, batches, several prefixes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM

from edgepeft.chat.protocol import Sampling
from edgepeft.engine.methods import attach, set_active
from edgepeft.engine.methods.files import read_values, save_adapter
from edgepeft.engine.methods.seeds import generator_of
from edgepeft.engine.model.load import LoadedModel, load_model
from edgepeft.engine.model.prefix import PrefixSite
from edgepeft.engine.training import attention
from edgepeft.engine.training.attention import packed, packed_attention
from edgepeft.errors import UsageError
from edgepeft.methods import METHODS, count_parameters
from edgepeft.methods.prefix import PrefixConfig
from edgepeft.models.config import read_shape
from edgepeft.models.store import ensure_model
from tiny import tiny_config

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0.0, max_new_tokens=16)
PROMPTS = [[256, 257, 40, 41, 42], [257, 70, 71, 72, 73, 74, 75, 76, 77, 78], [10, 20], [90, 91, 92, 93]]
STOPS = [258]


class Given:
    """A prefix of given keys and values, [tokens, kv_heads, head_dim] each."""

    def __init__(self, *pair: Tensor) -> None:
        self.pair = pair
        self.tokens = pair[0].shape[0]

    def keys_and_values(self) -> Any:
        return self.pair


def plain(query: Tensor, key: Tensor, value: Tensor, window: int | None, softcap: float | None) -> Tensor:
    """One sample's last tokens over all of its keys."""
    group, ahead = query.shape[1] // key.shape[1], key.shape[2] - query.shape[2]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(2, 3) * 0.25
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    behind = torch.arange(query.shape[2])[:, None] + ahead - torch.arange(key.shape[2])
    seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 7}, {"softcap": 5.0}, {"softcap": 5.0, "sliding_window": 3}]
)
@pytest.mark.parametrize("lengths", [[13], [1, 1, 5], [9, 30, 2, 9]], ids=str)
@pytest.mark.parametrize("rows", [8, 256])
def test_packed_rows_see_the_prefix_before_each_sample(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], lengths: list[int], rows: int
) -> None:
    monkeypatch.setattr(attention, "ATTENTION_ROWS", rows)
    torch.manual_seed(0)
    tokens = sum(lengths)
    query, key, value = (torch.randn(1, tokens, heads, 16).transpose(1, 2).requires_grad_() for heads in (6, 2, 2))
    before = [torch.randn(5, 2, 16).requires_grad_() for _ in range(2)]
    layer = nn.Identity()
    site = PrefixSite(layer, "layer")
    site.adapters["a"] = Given(*before)
    site.activate([("a", 1.0)])
    parts = []
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
        keys, values = (torch.cat([x.transpose(0, 1)[None], own], 2) for x, own in zip(before, (k, v), strict=True))
        parts.append(plain(q, keys, values, options.get("sliding_window"), options.get("softcap")))
    expected = torch.cat(parts, dim=1)
    weights = torch.randn(expected.shape)
    inputs = [query, key, value, *before]
    expected_grads = torch.autograd.grad((expected * weights).sum(), inputs)
    with packed(lengths):
        out, _ = packed_attention(layer, query, key, value, None, scaling=0.25, **options)
        grads = torch.autograd.grad((out * weights).sum(), inputs)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    for found, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


@pytest.fixture
def loaded(tiny_model: Path) -> LoadedModel:
    return load_model(ensure_model(str(tiny_model)), precision="fp32", compute_dtype="fp32", device=CPU)


def test_prefixes_stand_one_after_another(loaded: LoadedModel, tiny_model: Path) -> None:
    adapters = [attach(loaded, name, PrefixConfig(count), seed) for name, count, seed in (("a", 4, 1), ("b", 3, 2))]
    set_active(loaded, [("b", 1.0), ("a", 0.5)])
    assert loaded.leading_tokens == 7
    cache = DynamicCache()
    for layer, (first, second) in enumerate(
        zip(*(adapter.updates.values() for adapter in adapters[::-1]), strict=True)
    ):
        keys = torch.cat([first.keys, second.keys]).transpose(0, 1)[None]  # type: ignore[attr-defined]
        values = torch.cat([first.values, 0.5 * second.values]).transpose(0, 1)[None]  # type: ignore[attr-defined]
        cache.update(keys, values, layer)
    ids = torch.tensor([PROMPTS[1]])
    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.model(ids).logits, model(ids, past_key_values=cache).logits, rtol=1e-5, atol=1e-5
        )


def test_it_starts_as_the_base_reads_tokens(loaded: LoadedModel) -> None:
    """The prefix of the tokens t stands for t itself: what follows is as if they had been read."""
    adapter = attach(loaded, "a", PrefixConfig(4), seed=1)
    assert all(parameter.is_contiguous() for parameter in adapter.named_parameters().values())
    set_active(loaded, [("a", 1.0)])
    with torch.no_grad():
        found = loaded.model(torch.tensor([PROMPTS[1]])).logits
        set_active(loaded, [])
        start = torch.randint(0, 260, (1, 4), generator=generator_of(1, "prefix"))
        start[0, 0] = 256
        expected = loaded.model(torch.cat([start, torch.tensor([PROMPTS[1]])], dim=1)).logits[:, 4:]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_reparameterised_prefix_goes_on_as_what_it_made(loaded: LoadedModel, tmp_path: Path) -> None:
    config = PrefixConfig(4, reparameterised=True, width=12)
    save_adapter(tmp_path / "a", attach(loaded, "a", config, seed=1), "tiny")
    following = attach(loaded, "b", METHODS["prefix"].continued(config), seed=2)
    following.load_state_dict(read_values(tmp_path / "a", loaded))
    found = []
    for name in "ab":
        set_active(loaded, [(name, 1.0)])
        with torch.no_grad():
            found.append(loaded.model(torch.tensor([PROMPTS[1]])).logits)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"tokens": 0}, "0 tokens is not possible"), ({"width": 0}, "width of 0 is not possible")],
)
def test_a_config_that_cannot_be_is_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PrefixConfig(**settings)


def test_a_model_that_it_does_not_suit_is_refused(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="leave no place in a context of 512"):
        attach(loaded, "a", PrefixConfig(511), seed=0)
    next(iter(loaded.prefixes().values())).attention = "OtherAttention"
    with pytest.raises(UsageError, match="OtherAttention"):
        attach(loaded, "a", PrefixConfig(4), seed=0)
    sinks = tiny_config(model_type="gpt_oss", architectures=["GptOssForCausalLM"])
    with pytest.raises(UsageError, match="gpt_oss"):
        count_parameters(PrefixConfig(4), read_shape(sinks))
