"""How far two models' predictions are apart, and prompts that fit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from edgepeft.engine.combine import drift
from edgepeft.engine.combine.drift import batch_prompts, compare_logits
from edgepeft.engine.combine.streamed import logits_of, open_streamed
from edgepeft.engine.methods import set_active
from edgepeft.engine.methods.files import read_adapter
from edgepeft.errors import BadInput
from merging import IDS, adapted_logits, entry_of, folder_logits, write_adapter, write_base


def test_divergence_is_that_of_the_distributions() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]])
    q = torch.tensor([[0.25, 0.5, 0.25], [0.9, 0.05, 0.05]])
    real = torch.tensor([[True, True, False]])
    padded = [torch.cat([x, torch.full((1, 3), float("nan"))])[None] for x in (p.log() + 7, q.log() - 3)]
    found = compare_logits(*padded, real)
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert found.mean_kl == pytest.approx(expected / 2, rel=1e-6)
    assert found.max_kl == pytest.approx(expected, rel=1e-6)
    assert (found.top1_agreement, found.tokens, found.prompts) == (0.5, 2, 1)


def test_many_rows_are_compared_in_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(3, 67, 50, generator=generator) for _ in range(2))
    real = torch.ones(3, 67, dtype=torch.bool)
    found = compare_logits(p, q, real)
    expected = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert found.mean_kl == pytest.approx(float(expected.mean()), rel=1e-5)
    assert found.max_kl == pytest.approx(float(expected.max()), rel=1e-5)
    assert compare_logits(p, p, real).mean_kl == 0


def test_logits_that_are_not_finite_are_refused() -> None:
    broken = torch.full((1, 1, 3), float("nan"))
    with pytest.raises(BadInput, match="logits are not finite"):
        compare_logits(torch.zeros(1, 1, 3), broken, torch.ones(1, 1, dtype=torch.bool))


def test_prompts_are_padded_and_kept_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, real = batch_prompts([[1, 2, 3], [], [4], [5, 6]], vocab=100)
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]
    assert real.sum().item() == 6
    monkeypatch.setattr(drift, "_SHORTEST", 2)
    for tokens, shape in ((7, (3, 2)), (5, (2, 2)), (9, (3, 3)), (1, (1, 1))):
        monkeypatch.setattr(drift, "_LOGITS_BYTES", 4 * 100 * tokens)
        assert tuple(batch_prompts([[1, 2, 3], [4], [5, 6]], vocab=100)[0].shape) == shape
    for nothing in ([], [[]]):
        with pytest.raises(BadInput, match="no prompt"):
            batch_prompts(nothing, vocab=100)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_in_float32_it_is_the_same_model(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    entry = entry_of(write_base(tmp_path / "base", kind, dtype=dtype, tie_word_embeddings=False))
    torch.testing.assert_close(
        logits_of(open_streamed(entry), IDS), folder_logits(tmp_path / "base", torch.float32), rtol=1e-5, atol=1e-5
    )
    loaded = open_streamed(entry)
    read_adapter(write_adapter(tmp_path / "adapter", entry), loaded, "a")
    set_active(loaded, [("a", 1.0)])
    expected = adapted_logits(entry, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(loaded, IDS), expected, rtol=1e-5, atol=1e-5)
    # Once more: parameters were put back after the first pass.
    torch.testing.assert_close(logits_of(loaded, IDS), expected, rtol=1e-5, atol=1e-5)
    layer = loaded.layers[0]
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}


def test_padding_changes_nothing(tmp_path: Path) -> None:
    entry = entry_of(write_base(tmp_path / "base", "llama"))
    ids, real = batch_prompts([IDS[0].tolist(), IDS[1, :5].tolist()], vocab=260)
    found = logits_of(open_streamed(entry), ids)[1][real[1]]
    alone = logits_of(open_streamed(entry), IDS[1:2, :5])[0]
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
