"""Unsloth's way with a Llama, 2023.12 and 2024.4: one autograd function for several linears, buffers written over."""

import torch
from torch.nn import functional as F

from accuracy.published_parts import Nf4, attention, dequantize_in_two_steps, weight
from accuracy.published_torchtune import LINEARS, sizes_of_linears


class _Linear(torch.nn.Module):
    def __init__(self, sizes, technique):
        super().__init__()
        outputs, inputs = sizes
        self.base = Nf4(outputs, inputs) if technique["nf4"] else weight(outputs, inputs)
        self.a = weight(technique["rank"], inputs, dtype=torch.float32, trained=True)
        self.b = weight(outputs, technique["rank"], dtype=torch.float32, trained=True)

    def dense(self):
        if isinstance(self.base, Nf4):
            return dequantize_in_two_steps(self.base.codes, *self.base.shape)
        return self.base.detach()

    def apply_to(self, x):
        """x W^T plus the update, added in place; x [T, inputs]."""
        dense = self.dense()
        out = x @ dense.t()
        del dense
        out += (x @ self.a.to(x.dtype).t()) @ (2 * self.b.to(x.dtype).t())
        return out

    def apply_transposed(self, grad):
        """grad W plus the update's part."""
        dense = self.dense()
        out = grad @ dense
        del dense
        out += (grad @ self.b.to(grad.dtype)) @ (2 * self.a.to(grad.dtype))
        return out

    def gradients(self, x, grad):
        """Of the adapter, in float32 as their parameters are."""
        down, up = self.b.to(x.dtype), self.a.to(x.dtype)
        of_a = x.t() @ (grad @ down)
        of_b = (up @ x.t()) @ grad
        of_a *= 2
        of_b *= 2
        return of_a.t().to(self.a.dtype), of_b.t().to(self.b.dtype)

    def add_to(self, total, grad):
        """Adds grad W and the update's part to `total`."""
        dense = self.dense()
        total += grad @ dense
        del dense
        total += (grad @ self.b.to(grad.dtype)) @ (2 * self.a.to(grad.dtype))


class _Many(torch.autograd.Function):
    """Queries, keys and values of one input; the gradient of the input is written over it."""

    @staticmethod
    def forward(ctx, x, linears, *adapters):
        ctx.save_for_backward(x)
        ctx.linears = linears
        flat = x.view(-1, x.shape[-1])
        return tuple(linear.apply_to(flat).view(*x.shape[:-1], -1) for linear in linears)

    @staticmethod
    def backward(ctx, *grads):
        (x,) = ctx.saved_tensors
        flat = x.view(-1, x.shape[-1])
        grads = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        found = [part for linear, grad in zip(ctx.linears, grads, strict=True) for part in linear.gradients(flat, grad)]
        if len(ctx.linears) == 1:
            return ctx.linears[0].apply_transposed(grads[0]).view(x.shape), None, *found
        dense = ctx.linears[0].dense()
        total = torch.matmul(grads[0], dense, out=flat)
        del dense
        first = ctx.linears[0]
        total += (grads[0] @ first.b.to(x.dtype)) @ (2 * first.a.to(x.dtype))
        for linear, grad in zip(ctx.linears[1:], grads[1:], strict=True):
            linear.add_to(total, grad)
        return total.view(x.shape), None, *found


class _Mlp(torch.autograd.Function):
    """Keeps its input, gate and up; their gradients are written over them."""

    @staticmethod
    def forward(ctx, x, gate, up, down, *adapters):
        flat = x.view(-1, x.shape[-1])
        e, g = gate.apply_to(flat), up.apply_to(flat)
        h = torch.empty_like(e)
        ctx.save_for_backward(x, e, g)
        ctx.linears = gate, up, down
        return down.apply_to(h).view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        x, e, g = ctx.saved_tensors
        gate, up, down = ctx.linears
        flat, grad = x.view(-1, x.shape[-1]), grad.view(-1, grad.shape[-1])
        h = down.apply_transposed(grad)
        of_down, of_up, of_gate = down.gradients(h, grad), up.gradients(flat, e), gate.gradients(flat, g)
        dense = up.dense()
        total = torch.matmul(e, dense, out=flat)
        del dense
        total += (e @ up.b.to(x.dtype)) @ (2 * up.a.to(x.dtype))
        gate.add_to(total, g)
        return total.view(x.shape), None, None, None, *of_gate, *of_up, *of_down


class _Norm(torch.autograd.Function):
    """Keeps its input and a float32 number a row; the gradient is written over the one that comes in."""

    @staticmethod
    def forward(ctx, x, scale):
        rows = torch.empty(x.numel() // x.shape[-1], dtype=torch.float32)
        ctx.save_for_backward(x, scale, rows)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        _ = ctx.saved_tensors
        return grad.view(grad.shape), None


class _CrossEntropy(torch.autograd.Function):
    """Keeps the 16-bit logits, and writes their gradient over them."""

    @staticmethod
    def forward(ctx, logits):
        losses, sums = (torch.empty(logits.shape[0], dtype=torch.float32) for _ in range(2))
        ctx.save_for_backward(logits, sums)
        return losses

    @staticmethod
    def backward(ctx, grad):
        logits, _ = ctx.saved_tensors
        return logits.view(logits.shape)


class _Layer(torch.nn.Module):
    def __init__(self, shape, technique):
        super().__init__()
        sizes = sizes_of_linears(shape)
        self.linears = torch.nn.ModuleDict({letter: _Linear(sizes[letter], technique) for letter in LINEARS})
        self.norms = torch.nn.ParameterList(weight(shape["hidden"]) for _ in range(2))
        self._heads = shape["heads"]
        if technique["checkpoint"] == "offload":
            self.checkpointed = lambda hidden: _Offloaded.apply(self, hidden)

    def _adapters(self, letters):
        return [tensor for letter in letters for tensor in (self.linears[letter].a, self.linears[letter].b)]

    def forward(self, x):
        batch, length, hidden = x.shape
        normed = _Norm.apply(x, self.norms[0])
        q, k, v = _Many.apply(normed, [self.linears[letter] for letter in "qkv"], *self._adapters("qkv"))
        # Rotation is in place.
        q, k, v = (each.view(batch, length, self._heads, -1).transpose(1, 2) for each in (q, k, v))
        attended = attention(q, k, v, "flash").transpose(1, 2).reshape(batch, length, hidden)
        (out,) = _Many.apply(attended, [self.linears["o"]], *self._adapters("o"))
        x = x + out
        normed = _Norm.apply(x, self.norms[1])
        gate, up, down = (self.linears[letter] for letter in "gud")
        return x + _Mlp.apply(normed, gate, up, down, *self._adapters("gud"))


class _Offloaded(torch.autograd.Function):
    """The layer's input goes to the host; backward brings it back and computes the layer again."""

    @staticmethod
    def forward(ctx, layer, hidden):
        ctx.layer, ctx.shape, ctx.dtype = layer, hidden.shape, hidden.dtype
        with torch.no_grad():
            return layer(hidden)

    @staticmethod
    def backward(ctx, grad):
        hidden = torch.empty(ctx.shape, dtype=ctx.dtype, requires_grad=True)
        with torch.enable_grad():
            out = ctx.layer(hidden)
        torch.autograd.backward(out, grad)
        return None, hidden.grad


class Model(torch.nn.Module):
    """`layers` of the shape's layers. `ids` and `labels` are [B, L]."""

    inputs_require_gradients = True

    def __init__(self, shape, technique, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(_Layer(shape, technique) for _ in range(layers))
        self.norm = weight(shape["hidden"])
        self.embedding = weight(shape["vocab"], shape["hidden"])
        self.head = weight(shape["vocab"], shape["hidden"])
        self._positions, self._head_dim = shape["positions"], shape["hidden"] // shape["heads"]

    def in_each_layer(self, longest):
        """Cosines and sines, 16 bit."""
        return [2 * max(self._positions, longest) * self._head_dim] * 2

    def begin(self, ids):
        """What goes into the layers, and nothing beside."""
        return F.embedding(ids, self.embedding), ()

    def end(self, hidden, labels, marks, context):
        """The loss; nothing else is held while backward runs."""
        hidden = _Norm.apply(hidden, self.norm)
        logits = F.linear(hidden, self.head)
        loss = _CrossEntropy.apply(logits.view(-1, logits.shape[-1])).sum()
        marks.enter(("loss",))
        logits = logits.detach().float()
        return loss, None
