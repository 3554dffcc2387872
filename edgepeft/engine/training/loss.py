"""Cross-entropy over the vocabulary without ever holding the logits of all tokens.

Only rows whose next token is trained are multiplied with the output head, a chunk of rows at a time; the gradient with
respect to the hidden states is made in the forward, while the chunk's logits exist (compare Wijmans et al. 2024, *Cut
Your Losses*, arXiv 2411.09009, and Hsu et al. 2024, *Liger Kernel*, arXiv 2410.10989). Maximum, sum of exponentials and
loss are float32.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from edgepeft.engine.kernels import one_of, target_of
from edgepeft.engine.model.tables import LowRank
from edgepeft.engine.training.added_head import Product, add_product
from edgepeft.errors import BadInput
from edgepeft.memory.chunks import LOSS_SCRATCH_BYTES, loss_rows


class Head(NamedTuple):
    """The output head: logits = cap · tanh((hidden · (weight + added)ᵀ + bias) · scale / cap)."""

    weight: Tensor
    """[vocabulary, hidden]; float32 where it is trained."""
    bias: Tensor | None = None
    """[vocabulary]."""
    scale: float = 1.0
    """Granite divides by `logits_scaling`, Cohere multiplies by `logit_scale`."""
    softcap: float | None = None
    """`final_logit_softcapping` of the Gemma family; None where logits are not capped."""
    added: tuple[LowRank, ...] = ()
    """Products that adapters add to the matrix; it is never formed with them."""


def head_of(model: nn.Module, weight: Tensor) -> Head:
    """The head of a transformers causal LM, as its config describes it.

    Args:
        model: the whole model; its config and its output embeddings are read.
        weight: the head's matrix, [vocabulary, hidden].
    """
    config: Any = model.config
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) * float(
        getattr(config, "lm_head_multiplier", None) or 1.0
    )
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    outputs: Any = model.get_output_embeddings()  # type: ignore[operator]
    bias = getattr(outputs, "bias", None)
    return Head(weight, None if bias is None else bias.detach(), scale, None if softcap is None else float(softcap))


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    """Logits [rows, vocabulary] of hidden states [rows, hidden], before scale and cap, in the head's dtype."""
    if len(hidden) > 1 or hidden.device.type != "cpu":
        logits = _product(hidden, head)
    else:
        # One row: a matrix-vector product reads the head twice as fast.
        logits = torch.mv(head.weight, hidden[0])[None]
        logits = logits if head.bias is None else logits + head.bias
    for low in head.added:
        inner = (hidden @ low.A.to(hidden.dtype).t()).mul_(low.factor)
        logits.addmm_(inner, low.B.to(hidden.dtype).t())
    return logits


@torch.no_grad()
def knows_head(hidden: Tensor, head: Head, logits: Tensor) -> bool:
    """Whether our logits are the model's own, so that a head that does something else is never trained wrongly.

    Args:
        hidden: [rows, hidden], after the final norm.
        head: ours.
        logits: [rows, vocabulary], the model's own for the same rows.

    Raises:
        BadInput: the model's own are not finite.
    """
    check_finite(logits)
    if hidden.shape[-1] != head.weight.shape[-1] or logits.shape[-1] != head.weight.shape[0]:
        return False
    exact = hidden.dtype == torch.float32
    own = _bend(logits_of(hidden, _in_dtype(head, hidden.dtype)).float(), head)
    return agrees(own, logits, exact=exact)


def check_finite(logits: Tensor) -> None:
    """Refuses a base that computes nonsense.

    Raises:
        BadInput: a logit is not finite.
    """
    if not math.isfinite(logits.float().abs().max().item()):
        raise BadInput(
            "the base model computes values that are not finite numbers",
            hint="Its weights are damaged, or --compute-dtype is too narrow for it; try --compute-dtype fp32",
        )


def agrees(ours: Tensor, theirs: Tensor, *, exact: bool) -> bool:
    """Whether logits differ by no more than rounding; `exact` where all was computed in float32."""
    worst = (ours.float() - theirs.float()).abs().max().item()
    return worst <= theirs.float().abs().max().item() * (1e-4 if exact else 0.05) + 1e-6


def summed_loss(hidden: Tensor, rows: Tensor, targets: Tensor, head: Head, chunk_tokens: int) -> Tensor:
    """The summed negative log-likelihood of the trained tokens, natural logarithm, as a float32 scalar.

    Divide by the number of trained tokens of the whole optimizer step, not of the micro-batch.

    Args:
        hidden: [1, tokens, hidden], after the final norm, in the compute dtype; gets a gradient where it asks for one.
        rows: int64 [trained], positions whose next token is trained, each at most once.
        targets: int64 [trained], that next token.
        head: the output head; its matrix, and what is added to it, get gradients where they ask for them.
        chunk_tokens: rows whose logits exist at one time.
    """
    apply: Any = _SummedLoss.apply
    factors = [factor for low in head.added for factor in (low.A, low.B)]
    learns = any(tensor.requires_grad for tensor in (hidden, head.weight, *factors))
    loss: Tensor = apply(
        hidden, head.weight, rows, targets, head, chunk_tokens, learns and torch.is_grad_enabled(), *factors
    )
    return loss


_FACTORS = 7
"""Place of the first A among the arguments of the function below; its B, and further pairs, follow."""


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        rows: Tensor,
        targets: Tensor,
        head: Head,
        chunk_tokens: int,
        with_gradient: bool,
        *factors: Tensor,
    ) -> Tensor:
        count = rows.shape[0]
        width = hidden.shape[-1]
        flat = hidden.reshape(-1, width)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        filled_rows = loss_rows(count, chunk_tokens)
        gradient = hidden.new_empty(filled_rows, width) if with_gradient and ctx.needs_input_grad[0] else None
        trained = with_gradient and ctx.needs_input_grad[1]
        of_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if trained and count else None
        asked = [with_gradient and asks for asks in ctx.needs_input_grad[_FACTORS::2]]
        products = [Product(low, flat, trains) for low, trains in zip(head.added, asked, strict=True) if count]
        head = _in_dtype(head, hidden.dtype)
        # One buffer serves every chunk: mapping fresh pages costs as much as a pass over them.
        buffer = hidden.new_empty(min(chunk_tokens, filled_rows), head.weight.shape[0]) if count else None
        for begin in one_of(range(0, count, chunk_tokens)):
            wanted = rows[begin : begin + chunk_tokens]
            filled = min(chunk_tokens, filled_rows - begin)
            picked = flat.new_zeros(filled, width)
            torch.index_select(flat, 0, wanted, out=picked[: wanted.shape[0]])
            assert buffer is not None
            logits = _product(picked, head, out=buffer[:filled])
            for product in products:
                product.add_forward(picked, wanted, logits)
            total += _losses_in_place(
                logits[: wanted.shape[0]], targets[begin : begin + chunk_tokens], head, with_gradient
            )
            part = None
            if gradient is not None:
                part = torch.mm(logits, head.weight, out=gradient[begin : begin + filled])
            if of_weight is not None:
                add_product(of_weight, logits, picked)
            for product in products:
                product.add_backward(picked, logits, part)
            del picked, logits
        ctx.save_for_backward(rows, *([] if gradient is None else [gradient]))
        ctx.shape = hidden.shape
        ctx.of_weight = of_weight
        ctx.of_factors = [of_factor for product in products for of_factor in product.gradients or (None, None)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        rows, *gradients = ctx.saved_tensors
        full = None
        for gradient in gradients:
            full = gradient.new_zeros(ctx.shape)
            full.view(-1, ctx.shape[-1]).index_copy_(0, rows, gradient[: rows.shape[0]] * grad_loss.to(gradient.dtype))
        # Given up here: autograd takes them as the gradients, or adds them to those that are there.
        of_weight, ctx.of_weight = ctx.of_weight, None
        of_factors, ctx.of_factors = ctx.of_factors, []
        for own in (of_weight, *of_factors):
            if own is not None:
                own.mul_(grad_loss)
        count = len(ctx.needs_input_grad) - _FACTORS
        return full, of_weight, None, None, None, None, None, *(of_factors or [None] * count)


def _in_dtype(head: Head, dtype: torch.dtype) -> Head:
    return head._replace(weight=head.weight.detach().to(dtype))


def _product(picked: Tensor, head: Head, out: Tensor | None = None) -> Tensor:
    """Hidden states times the head's matrix, before scale and cap, [rows, vocabulary]."""
    if head.bias is None:
        return torch.mm(picked, head.weight.t(), out=out)
    return torch.addmm(head.bias, picked, head.weight.t(), out=out)


def _bend(logits: Tensor, head: Head) -> Tensor:
    """Scale and soft cap, in place."""
    if head.scale != 1.0:
        logits.mul_(head.scale)
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def _losses_in_place(logits: Tensor, targets: Tensor, head: Head, with_gradient: bool) -> Tensor:
    """The summed loss of a chunk; with a gradient, `logits` is overwritten by it.

    Args:
        logits: [rows, vocabulary] in the compute dtype, before scale and cap.
        targets: [rows].
        head: its scale and cap.
        with_gradient: whether to leave the derivative with respect to the unscaled, uncapped logits in `logits`.
    """
    count, vocabulary = logits.shape
    block_bytes = LOSS_SCRATCH_BYTES[target_of(logits.device).kind]
    step = max(1, min(count, block_bytes // (4 * vocabulary)))
    scratch = torch.empty(step, vocabulary, dtype=torch.float32, device=logits.device)
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    for begin in one_of(range(0, count, step)):
        block = slice(begin, begin + step)
        total += _block_loss_in_place(logits[block], targets[block].unsqueeze(1), scratch, head, with_gradient)
    return total


def _block_loss_in_place(block: Tensor, index: Tensor, scratch: Tensor, head: Head, with_gradient: bool) -> Tensor:
    """The same for some rows, by way of `scratch`, float32 [rows or more, vocabulary]; index is [rows, 1]."""
    values = scratch[: block.shape[0]]
    values.copy_(block)
    _bend(values, head)
    wanted = values.gather(1, index)
    slope = None
    if head.softcap is not None and with_gradient:
        slope = (values / head.softcap).square_().neg_().add_(1)
    top = values.amax(1, keepdim=True)
    sums = values.sub_(top).exp_().sum(1, keepdim=True)
    loss = (sums.log() + top - wanted).sum()
    if not with_gradient:
        return loss
    likelihood = values.gather(1, index) / sums
    # Softmax minus one-hot, in float32: 1 - p would lose the target's entry in 16 bit, and there the CPU scatters by
    # way of a copy.
    values.mul_(sums.reciprocal_()).scatter_(1, index, likelihood - 1)
    if slope is not None:
        values.mul_(slope)
    block.copy_(values if head.scale == 1.0 else values.mul_(head.scale))
    return loss
