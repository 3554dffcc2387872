"""Packed attention equals attention sample by sample, forward and backward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgepeft.engine.training import attention
from edgepeft.engine.training.attention import packed, packed_attention
from edgepeft.errors import BadInput


def plain(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float, **options: Any) -> Tensor:
    """Every pair of positions scored, what may not be seen hidden."""
    window, softcap = options.get("sliding_window"), options.get("softcap")
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.arange(query.shape[2])
    seen = (sample[:, None] == sample) & (position[:, None] >= position)
    if window:
        seen &= position[:, None] - position < window
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value).transpose(1, 2)


def tensors(tokens: int, heads: int, kv_heads: int, dim: int, value_dim: int | None = None) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(tokens, heads, dim), (tokens, kv_heads, dim), (tokens, kv_heads, value_dim or dim)]
    return [torch.randn(1, *shape).transpose(1, 2).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(
    "options",
    [{}, {"sliding_window": 7}, {"softcap": 5.0}, {"softcap": 5.0, "sliding_window": 7}, {"sliding_window": 10**6}],
    ids=["causal", "window", "softcap", "both", "wide-window"],
)
@pytest.mark.parametrize("lengths", [[13], [1, 1, 5], [9, 30, 2, 9], [40, 33, 21, 2]], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_equals_plain_attention(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], lengths: list[int], heads: int, kv_heads: int
) -> None:
    monkeypatch.setattr(attention, "ATTENTION_ROWS", 8)
    query, key, value = tensors(sum(lengths), heads, kv_heads, 16)
    expected = plain(query, key, value, lengths, 0.25, **options)
    weights = torch.randn(expected.shape)
    expected_grads = torch.autograd.grad((expected * weights).sum(), [query, key, value])
    with packed(lengths):
        out, _ = packed_attention(nn.Identity(), query, key, value, None, scaling=0.25, **options)
        grads = torch.autograd.grad((out * weights).sum(), [query, key, value])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    for found, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_products_have_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[tuple[int, ...]]] = []
    product = torch.bmm

    def bmm(a: Tensor, b: Tensor) -> Tensor:
        seen[-1].add((*a.shape, b.shape[2]))
        return product(a, b)

    monkeypatch.setattr(torch, "bmm", bmm)
    for lengths in ([33, 64, 31], [50, 60, 18], [64, 63, 1]):
        query, key, value = tensors(sum(lengths), 4, 2, 16)
        seen.append(set())
        with packed(lengths):
            packed_attention(nn.Identity(), query, key, value)[0].sum().backward()
    assert seen[0] == seen[1] == seen[2]


def test_values_of_another_width() -> None:
    query, key, value = tensors(12, 4, 2, 16, value_dim=8)
    with packed([5, 7]):
        out, _ = packed_attention(nn.Identity(), query, key, value, None)
    torch.testing.assert_close(out, plain(query, key, value, [5, 7], 0.25), atol=1e-5, rtol=1e-4)


def test_other_devices_path_equals_plain() -> None:
    """The path of cards without the flash kernel is device-free code, so the CPU can check it."""
    query, key, value = tensors(20, 4, 2, 16)
    segments = attention.Segments([8, 12])
    out = attention._by_sample(query, key, value, segments, 0.25)
    torch.testing.assert_close(out, plain(query, key, value, [8, 12], 0.25), atol=1e-5, rtol=1e-4)


def test_bfloat16_is_within_rounding() -> None:
    query, key, value = (x.detach() for x in tensors(600, 4, 2, 32))
    lengths = [300, 40, 260]
    expected = [x.requires_grad_() for x in (query.clone(), key.clone(), value.clone())]
    plain(*expected, lengths, 0.18).sum().backward()
    found = [x.bfloat16().requires_grad_() for x in (query, key, value)]
    with packed(lengths):
        packed_attention(nn.Identity(), *found, None, scaling=0.18)[0].sum().backward()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert (ours.grad.float() - theirs.grad).norm() <= 0.02 * theirs.grad.norm()


def test_context_nests_and_is_required_to_fit() -> None:
    query, key, value = tensors(6, 2, 2, 16)
    with packed([2, 4]):
        with packed([6]):
            whole, _ = packed_attention(nn.Identity(), query, key, value, None)
        split, _ = packed_attention(nn.Identity(), query, key, value, None)
    outside, _ = packed_attention(nn.Identity(), query, key, value, None)
    assert torch.equal(whole, outside)
    assert not torch.allclose(whole, split)
    with packed([3]), pytest.raises(RuntimeError, match="does not fit"):
        packed_attention(nn.Identity(), query, key, value, None)


@pytest.mark.parametrize(
    "options", [{"dropout": 0.1}, {"s_aux": torch.zeros(2)}, {"is_causal": False}, {"attention_mask": torch.ones(6, 6)}]
)
def test_what_it_cannot_do_is_refused(options: dict[str, Any]) -> None:
    query, key, value = tensors(6, 2, 2, 16)
    with pytest.raises(BadInput):
        packed_attention(nn.Identity(), query, key, value, **options)


def test_chunked_attention_is_refused() -> None:
    model: Any = SimpleNamespace(config=SimpleNamespace(layer_types=["chunked_attention"]))
    with pytest.raises(BadInput, match="chunks"):
        attention.use_packed_attention(model)


def test_every_transformers_family_calls_it_exactly() -> None:
    """Windows, caps and grouped heads arrive through transformers' own call, without a mask of [tokens, tokens]."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
    }
    lengths = [11, 3, 18]
    for kind, extra in {
        "llama": {},
        "mistral": {"sliding_window": 6},
        "gemma2": {"sliding_window": 6, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
        "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 8},
        "qwen3": {},
        "olmo2": {},
        "phi3": {"sliding_window": 6},
    }.items():
        torch.manual_seed(1)
        model = (
            AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **common, **extra)).eval().requires_grad_(False)
        )
        ids = torch.randint(1, 64, (1, sum(lengths)))
        model.set_attn_implementation("eager")
        apart = torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1)
        attention.use_packed_attention(model)
        positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
        with packed(lengths):
            together = model(ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4, msg=kind)
