"""What peers' models are made of, as far as memory depends on it: weights, attention kernels, rotation, losses."""

import torch
from torch.nn import functional as F

from edgepeft.memory.unseen import efficient_backward, flash_backward, total_bytes


def weight(*shape, dtype=torch.bfloat16, trained=False):
    return torch.nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=trained)


class Nf4(torch.nn.Module):
    """A matrix of 4-bit codes in blocks of 64, whose 8-bit scales share a float32 scale in blocks of 256."""

    def __init__(self, outputs, inputs):
        super().__init__()
        entries = outputs * inputs
        self.shape = outputs, inputs
        for name, size, dtype in (
            ("codes", entries // 2, torch.uint8),
            ("scales", entries // 64, torch.uint8),
            ("scales_of_scales", -(-entries // (64 * 256)), torch.float32),
        ):
            self.register_buffer(name, torch.empty(size, dtype=dtype))


@torch.library.custom_op("published::dequantize", mutates_args=())
def dequantize(codes: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """The 16-bit matrix, by one fused kernel."""
    raise NotImplementedError


@dequantize.register_fake
def _(codes, outputs, inputs):
    return codes.new_empty((outputs, inputs), dtype=torch.bfloat16)


def dequantize_in_two_steps(codes, outputs, inputs):
    """bitsandbytes: the scales become float32 first."""
    scales = torch.empty(outputs * inputs // 64, dtype=torch.float32)
    dense = dequantize(codes, outputs, inputs)
    del scales
    return dense


class _Nf4Linear(torch.autograd.Function):
    """Keeps the codes; the dense matrix is made again in backward."""

    @staticmethod
    def forward(ctx, x, codes, outputs, inputs, dense_of):
        ctx.save_for_backward(codes)
        ctx.rest = outputs, inputs, dense_of
        return F.linear(x, dense_of(codes, outputs, inputs))

    @staticmethod
    def backward(ctx, grad):
        (codes,) = ctx.saved_tensors
        outputs, inputs, dense_of = ctx.rest
        return grad @ dense_of(codes, outputs, inputs), None, None, None, None


def frozen_linear(x, matrix, *, bitsandbytes=False):
    """x W^T for a dense parameter or an `Nf4`."""
    if isinstance(matrix, Nf4):
        return _Nf4Linear.apply(x, matrix.codes, *matrix.shape, dequantize_in_two_steps if bitsandbytes else dequantize)
    return F.linear(x, matrix)


class _Attention(torch.autograd.Function):
    """A fused attention kernel: keeps queries, keys, values, the result and float32 row sums; scratch in backward."""

    @staticmethod
    def forward(ctx, q, k, v, kind, bias):
        # q, k, v [B, heads, L, D]; the result has the strides of q, as the kernels give it.
        out = torch.empty_like(q)
        sums = torch.empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums, bias)
        ctx.kind = kind
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *_ = ctx.saved_tensors
        batch, heads, length, head_dim = q.shape
        if ctx.kind == "flex":
            scratch = [4 * batch * heads * length]
        elif ctx.kind == "flash":
            rows = flash_backward(
                tokens=batch * length,
                samples=batch,
                heads=heads,
                kv_heads=k.shape[1],
                head_dim=head_dim,
                compute_bytes=q.element_size(),
            )
            scratch = [row.size_bytes for row in rows]
        else:
            scratch = [batch * total_bytes(efficient_backward(tokens=length, heads=heads, head_dim=head_dim))]
        held = [torch.empty(size, dtype=torch.uint8) for size in scratch]
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del held
        return *grads, None, None


def attention(q, k, v, kind):
    """Causal attention over [B, heads, L, D]; keys and values have as many heads as queries.

    Args:
        kind: `flash`, `flex`, or `masked`: the memory-efficient kernel with a boolean mask that becomes a 16-bit bias.
    """
    bias = None
    if kind == "masked":
        bias = torch.empty(q.shape[0], 1, q.shape[2], q.shape[2], dtype=q.dtype)
    return _Attention.apply(q, k, v, kind, bias)


def shifted_loss(logits, labels):
    """Cross entropy over float32 logits that are shifted by a contiguous copy; [B, L, V], [B, L]."""
    shifted = logits[..., :-1, :].contiguous()
    return F.cross_entropy(shifted.view(-1, shifted.shape[-1]), labels[..., 1:].reshape(-1))
