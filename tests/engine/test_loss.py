"""The chunked loss equals F.cross_entropy over all logits, in value and gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from edgepeft.engine.ledger import LiveBytes
from edgepeft.engine.training import added_head
from edgepeft.engine.training import loss as loss_module
from edgepeft.engine.training.loss import Head, head_of, knows_head, summed_loss
from edgepeft.errors import BadInput

TOKENS, WIDTH, VOCABULARY = 37, 24, 101


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(1, TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH).to(dtype)
    rows = torch.tensor([0, 1, 5, 6, 7, 20, 21, 36])
    return hidden, weight, torch.randn(VOCABULARY).to(dtype), rows, torch.randint(0, VOCABULARY, rows.shape)


def plain(hidden: Tensor, head: Head, rows: Tensor, targets: Tensor) -> Tensor:
    logits = (F.linear(hidden[0, rows], head.weight, head.bias) * head.scale).float()
    if head.softcap:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    return F.cross_entropy(logits, targets, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
@pytest.mark.parametrize("options", [{}, {"scale": 2.0, "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_a_trained_head_gets_its_gradient(chunk: int, options: dict[str, float], biased: bool) -> None:
    hidden, weight, bias, rows, targets = inputs()
    head = Head(weight.requires_grad_(), bias if biased else None, **options)
    (expected,) = torch.autograd.grad(plain(hidden, head, rows, targets) / 7, weight)
    (found,) = torch.autograd.grad(summed_loss(hidden, rows, targets, head, chunk) / 7, weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not summed_loss(hidden, rows, targets, head, chunk).requires_grad


def test_a_trained_heads_gradient_is_formed_in_float32_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(added_head, "TABLE_ROWS", 20)
    hidden, weight, _, rows, targets = inputs(torch.bfloat16)
    trained = weight.float().requires_grad_()
    head = Head(trained)
    with LiveBytes(torch.device("cpu"), others=False) as ledger:
        loss = summed_loss(hidden, rows, targets, head, 4)
    loss.backward()
    exact = weight.float().requires_grad_()
    plain(hidden.detach().float(), Head(exact), rows, targets).backward()
    assert trained.grad is not None
    assert exact.grad is not None
    assert trained.grad.dtype == torch.float32
    assert float((trained.grad - exact.grad).norm() / exact.grad.norm()) < 0.02
    # The gradient, the head in 16 bit, and 20 of its 101 rows in 16 bit: no second gradient.
    scratch = 4 * TOKENS * VOCABULARY
    assert ledger.peak_bytes < 4 * weight.numel() + 2 * weight.numel() + 2 * 20 * WIDTH + scratch
    again = trained.grad
    summed_loss(hidden, rows, targets, head, 4).backward()
    assert trained.grad is again


@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"scale": 0.25}, {"scale": 2.0, "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_value_and_gradient(
    monkeypatch: pytest.MonkeyPatch, chunk: int, options: dict[str, float], biased: bool
) -> None:
    monkeypatch.setattr(loss_module, "LOSS_SCRATCH_BYTES", {"cpu": 4 * VOCABULARY * 2})
    hidden, weight, bias, rows, targets = inputs()
    head = Head(weight, bias if biased else None, **options)
    expected = plain(hidden, head, rows, targets)
    (expected_grad,) = torch.autograd.grad(expected / 7, hidden)
    found = summed_loss(hidden, rows, targets, head, chunk)
    (grad,) = torch.autograd.grad(found / 7, hidden)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)
    assert not grad[0, 2:5].any()


def test_bfloat16_loss_has_float32_statistics() -> None:
    hidden, weight, _, rows, targets = inputs(torch.bfloat16)
    head = Head(weight)
    found = summed_loss(hidden, rows, targets, head, 4)
    found.backward()
    exact = hidden.detach().float().requires_grad_()
    expected = plain(exact, Head(weight.float()), rows, targets)
    expected.backward()
    assert found.dtype == torch.float32
    assert abs(found.item() - expected.item()) <= 3e-3 * expected.item()
    assert hidden.grad is not None
    assert exact.grad is not None
    assert (hidden.grad.float() - exact.grad).norm() <= 0.02 * exact.grad.norm()


def test_evaluation_forms_no_gradient() -> None:
    hidden, weight, _, rows, targets = inputs()
    with torch.no_grad():
        value = summed_loss(hidden, rows, targets, Head(weight), 3)
    assert not value.requires_grad
    torch.testing.assert_close(value, plain(hidden, Head(weight), rows, targets).detach())


def test_no_trained_row_costs_nothing() -> None:
    hidden, weight, *_ = inputs()
    none = torch.empty(0, dtype=torch.int64)
    value = summed_loss(hidden, none, none, Head(weight), 3)
    value.backward()
    assert value.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_logits_of_all_tokens_never_exist() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(1, 512, 8, requires_grad=True)
    weight, rows = torch.randn(5000, 8), torch.arange(512)
    with LiveBytes(torch.device("cpu")) as counter:
        before = counter.live_bytes
        summed_loss(hidden, rows, rows, Head(weight), 16).backward()
    assert counter.peak_bytes - before < 512 * 5000 * 4 / 4


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("llama", {}),
        ("gemma2", {"final_logit_softcapping": 1.5}),
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.5}),
        ("phi", {}),
    ],
)
def test_head_is_read_from_the_config(kind: str, extra: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, **extra,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
        ids = torch.randint(0, 64, (1, 9))
        logits = model(ids).logits[0]
        hidden = model.get_decoder()(ids).last_hidden_state[0]
    head = head_of(model, model.get_output_embeddings().weight)
    assert knows_head(hidden, head, logits)
    assert not knows_head(hidden, head._replace(scale=head.scale * 1.5), logits)
    with pytest.raises(BadInput, match="not finite"):
        knows_head(hidden, head, logits * float("nan"))


def test_a_head_that_gives_nan_is_refused() -> None:
    hidden, weight, *_ = inputs()
    with pytest.raises(BadInput):
        knows_head(hidden[0].detach(), Head(weight), torch.full((TOKENS, VOCABULARY), float("nan")))
