"""Attention over packed rows: several samples lie one behind the other in a row, and none sees another.

Where a sample ends is said by `packed(lengths)`, which must be in force in forward and in backward (checkpointing runs
the forward again there). No mask of [tokens, tokens] is built: each sample is attended to by itself, at a cost that
grows with the sample's length and not with the row's.

Keys and values that stand before every sample (engine.model.prefix) are put in front of each one's own; rows of queries
are not. A sample's queries then belong to its last keys.

The function is registered with transformers under `PACKED`; a model uses it after `use_packed_attention(model)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface

from edgepeft.engine.kernels import enough, fused_attention, one_of_each, target_of
from edgepeft.engine.model.frozen import DTYPES
from edgepeft.engine.model.prefix import PACKED, prefix_of
from edgepeft.errors import BadInput
from edgepeft.memory.chunks import ATTENTION_ROWS, in_attention_steps
from edgepeft.spec import ComputeDtype

_NAMES: dict[torch.dtype, ComputeDtype] = {dtype: name for name, dtype in DTYPES.items()}


class Segments:
    """The samples of one packed row: their lengths, and what the kernels want to know of them."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)
        self.starts = (0, *accumulate(self.lengths))
        self.longest = max(self.lengths)
        self._offsets: dict[int, Tensor] = {}
        self._places: tuple[Tensor, Tensor] | None = None

    @property
    def tokens(self) -> int:
        """Length of the row."""
        return self.starts[-1]

    def samples(self, ahead: int = 0) -> list[_Sample]:
        """The samples, with so many keys ahead of each one's own."""
        lengths = enumerate(zip(self.starts, self.lengths, strict=False))
        return [_Sample(start, length, start + number * ahead, ahead) for number, (start, length) in lengths]

    def offsets(self, device: torch.device, ahead: int = 0) -> Tensor:
        """Cumulative lengths, so many keys ahead of each sample included, int32 [samples + 1]; made once a batch."""
        found = self._offsets.get(ahead)
        if found is None or found.device != device:
            starts = [start + number * ahead for number, start in enumerate(self.starts)]
            found = self._offsets[ahead] = torch.tensor(starts, dtype=torch.int32, device=device)
        return found

    def places(self, device: torch.device, ahead: int) -> tuple[Tensor, Tensor]:
        """Where among all keys the samples' own lie, int64 [tokens], and those ahead, [samples · ahead].

        They are made once a batch, whose layers all have as many ahead.
        """
        if self._places is None or self._places[0].device != device:
            numbers = np.repeat(np.arange(len(self.lengths)), self.lengths)
            own = np.arange(self.tokens) + (numbers + 1) * ahead
            before = np.add.outer([sample.first_key for sample in self.samples(ahead)], np.arange(ahead)).ravel()
            self._places = torch.tensor(own, device=device), torch.tensor(before, device=device)
        return self._places


class _Sample(NamedTuple):
    """Where one sample lies."""

    start: int
    """Its first row of queries."""
    length: int
    """Rows of queries."""
    first_key: int
    """That it sees, among all keys."""
    ahead: int
    """Keys before its own."""

    @property
    def shift(self) -> int:
        """From a row of queries to that token's own key."""
        return self.first_key + self.ahead - self.start


# A plain global: backward on CUDA runs in another thread, which sees neither thread-locals nor context variables.
_current: Segments | None = None


@contextmanager
def packed(lengths: Sequence[int]) -> Iterator[Segments]:
    """Says which samples the row holds, for every forward and backward inside the block.

    Args:
        lengths: tokens of each sample, in the order they lie in the row.
    """
    global _current
    before, segments = _current, Segments(lengths)
    _current = segments
    try:
        yield segments
    finally:
        _current = before


def use_packed_attention(model: nn.Module) -> None:
    """Switches a transformers model to packed attention.

    Raises:
        BadInput: its attention needs something that packed rows cannot give exactly.
    """
    config: Any = model.config
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise BadInput(f"{type(model).__name__} attends in chunks, which training cannot do yet")
    set_implementation: Any = model.set_attn_implementation
    set_implementation(PACKED)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sample of a packed row, as transformers calls it.

    Args:
        module: the attention layer; it may have keys and values that stand before every sample.
        query: [1, heads, tokens, head_dim].
        key: [1, kv_heads, tokens, head_dim]; each of its heads serves heads / kv_heads query heads.
        value: [1, kv_heads, tokens, value_dim].
        attention_mask: must be None: what may be seen follows from the packing.
        scaling: factor of the scores; None stands for 1 / √head_dim.
        dropout: must be 0.
        sliding_window: a token sees this many tokens, itself included; None means all before it.
        softcap: scores s become c · tanh(s / c) (Gemma 2, arXiv 2408.00118).
        s_aux: attention sinks; refused.
        is_causal: must not be False.

    Returns:
        [1, tokens, heads, value_dim], and None for the weights.

    Raises:
        BadInput: the layer asks for something else than causal attention.
    """
    if attention_mask is not None or dropout or s_aux is not None or is_causal is False:
        what = (
            "an attention mask of its own"
            if attention_mask is not None
            else "attention dropout"
            if dropout
            else "attention sinks"
            if s_aux is not None
            else "attention in both directions"
        )
        raise BadInput(f"this model uses {what}, which packed training cannot do exactly", where=type(module).__name__)
    segments = _current
    if segments is None or segments.tokens != query.shape[2] or query.shape[0] != 1:
        if segments is not None or query.shape[0] != 1:
            shape = tuple(query.shape)
            raise RuntimeError(f"packed({None if segments is None else segments.lengths}) does not fit queries {shape}")
        segments = Segments([query.shape[2]])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    prefix = prefix_of(module)
    ahead = 0 if prefix is None else prefix.tokens
    if prefix is not None:
        put_before: Any = _Prefixed.apply
        keys, values = prefix.keys_and_values()
        key, value = put_before(key, keys, segments), put_before(value, values, segments)
        del keys, values
    window = sliding_window if sliding_window is not None and segments.longest + ahead > sliding_window else None
    target = target_of(query.device)
    same_width = query.shape[-1] == value.shape[-1]
    kernel = target.attention(
        query.shape[-1],
        _NAMES[query.dtype],
        softcap=softcap is not None,
        windowed=window is not None,
        prefixed=prefix is not None,
    )
    if kernel == "varlen" and same_width:
        return _varlen(query, key, value, segments, scale, window, ahead), None
    if kernel == "by sample" or (kernel == "varlen" and window is None and prefix is None):
        return _by_sample(query, key, value, segments, scale), None
    apply: Any = _BlockAttention.apply
    out: Tensor = apply(query, key, value, segments, scale, window, softcap, ahead)
    return out, None


def _no_dense_mask(*, use_vmap: bool = False, **_: Any) -> None:
    """Stands where transformers would build a mask of [tokens, tokens]; layers with rules of their own are refused."""
    if use_vmap:
        raise BadInput("this model changes which tokens see each other, which packed training cannot do exactly")


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _no_dense_mask)


class _Prefixed(torch.autograd.Function):
    """Keys (or values) [1, kv_heads, tokens, dim] of a row, with `before` [ahead, kv_heads, dim] ahead of each sample.

    The result is [1, kv_heads, tokens + samples · ahead, dim], in the layout [tokens, kv_heads, dim].
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, before: Tensor, segments: Segments) -> Tensor:
        rows = own[0].transpose(0, 1)
        ahead, count = before.shape[0], len(segments.lengths)
        places, places_before = segments.places(own.device, ahead)
        out = rows.new_empty(rows.shape[0] + count * ahead, *rows.shape[1:])
        out.index_copy_(0, places, rows)
        out.index_put_((places_before.view(count, ahead),), before.to(out.dtype))
        ctx.places = places, places_before.view(count, ahead)
        ctx.dtype = before.dtype
        return out.transpose(0, 1).unsqueeze(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows = gradient[0].transpose(0, 1)
        places, places_before = ctx.places
        own = None
        if ctx.needs_input_grad[0]:
            own = rows.index_select(0, places).transpose(0, 1).unsqueeze(0)
        if not ctx.needs_input_grad[1]:
            return own, None, None
        parts = rows.index_select(0, places_before.flatten()).view(*places_before.shape, *rows.shape[1:])
        return own, parts.sum(0, dtype=ctx.dtype), None


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None, ahead: int
) -> Tensor:
    """All samples in one launch of the flash kernel (torch.nn.attention.varlen).

    Where a sample has more keys than queries, the kernel takes the queries for the last tokens, as they are.
    """
    from torch.nn.attention.varlen import varlen_attn

    device = query.device
    out = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        segments.offsets(device),
        segments.offsets(device, ahead),
        segments.longest,
        segments.longest + ahead,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)


def _by_sample(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
    """Sample by sample through the memory-efficient kernel, for cards before Ampere and other devices."""
    grouped = query.shape[1] != key.shape[1]
    parts = []
    for sample in segments.samples():
        q, k, v = (x.narrow(2, sample.start, sample.length) for x in (query, key, value))
        if grouped:
            # The memory-efficient kernel knows no grouped heads, and the math fallback would build the full scores.
            k, v = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (k, v))
        parts.append(fused_attention(q, k, v, scale).transpose(1, 2))
    return torch.cat(parts, dim=1)


class _BlockAttention(torch.autograd.Function):
    """Exact attention in blocks of query rows; keeps queries, keys and values only.

    Backward forms the probabilities of a block again. On the CPU plain matrix products are faster than torch's flash
    kernel in 16 bit: up to twice in forward, several times in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Segments,
        scale: float,
        window: int | None,
        softcap: float | None,
        ahead: int,
    ) -> Tensor:
        _, heads, tokens, _ = query.shape
        kv_heads = key.shape[1]
        out = query.new_empty(1, tokens, heads, value.shape[-1])
        # Heads that share a key become rows of one product: [kv_heads, group, tokens, head_dim].
        q = _grouped(query[0], kv_heads)
        k, v = key[0], value[0]
        target = _grouped(out[0].transpose(0, 1), kv_heads)
        for sample in one_of_each(segments.samples(ahead), _length):
            for block in enough(_blocks(sample, window, k.shape[1])):
                weights = block.probabilities(block.rows(q, scale), block.keys(k), softcap)[0]
                part = torch.bmm(weights.flatten(1, 2), block.keys(v))
                block.write_rows(target, part)
                # Before the next block makes its own.
                del weights, part
        ctx.save_for_backward(query, key, value)
        ctx.options = (segments, scale, window, softcap, ahead)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        segments, scale, window, softcap, ahead = ctx.options
        kv_heads = key.shape[1]
        q = _grouped(query[0], kv_heads)
        g = _grouped(grad_out[0].transpose(0, 1), kv_heads)
        k, v = key[0], value[0]
        # The gradients take the layout [tokens, heads, head_dim] that the projections before them produce and consume.
        grad_query, grad_key, grad_value = (
            torch.empty_like(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value)
        )
        dq = _grouped(grad_query[0], kv_heads)
        dk, dv = grad_key[0], grad_value[0]
        for sample in one_of_each(segments.samples(ahead), _length):
            blocks = _blocks(sample, window, k.shape[1])
            several = len(blocks) > 1
            first, length = sample.first_key, sample.length + ahead
            # Sums over blocks are kept in float32: 16 bit would round once a block.
            dk_sum, dv_sum = (
                torch.zeros(x.shape[0], length, x.shape[2], dtype=torch.float32, device=x.device) if several else None
                for x in (k, v)
            )
            for block in enough(blocks):
                scaled = block.rows(q, scale)
                keys = block.keys(k)
                weights, slope = block.probabilities(scaled, keys, softcap)
                part = block.rows(g, 1.0).flatten(1, 2)
                dv_part = block.own_keys(torch.bmm(weights.flatten(1, 2).transpose(1, 2), part))
                d_scores = torch.bmm(part, block.keys(v).transpose(1, 2)).view_as(weights)
                torch._softmax_backward_data(d_scores, weights, -1, weights.dtype, grad_input=d_scores)
                del weights
                if slope is not None:
                    d_scores.mul_(slope)
                d_scores = d_scores.flatten(1, 2)
                block.write_rows(dq, torch.bmm(d_scores, keys).mul_(scale))
                dk_part = block.own_keys(torch.bmm(d_scores.transpose(1, 2), scaled.flatten(1, 2)))
                if dk_sum is None or dv_sum is None:
                    if block.first_key > first:
                        # A window that is shorter than what stands ahead.
                        dk.narrow(1, first, block.first_key - first).zero_()
                        dv.narrow(1, first, block.first_key - first).zero_()
                    dk.narrow(1, block.first_key, block.end_key - block.first_key).copy_(dk_part)
                    dv.narrow(1, block.first_key, block.end_key - block.first_key).copy_(dv_part)
                else:
                    dk_sum[:, block.first_key - first : block.end_key - first] += dk_part
                    dv_sum[:, block.first_key - first : block.end_key - first] += dv_part
                # Before the next block makes its own.
                del scaled, slope, d_scores, part, dk_part, dv_part
            if dk_sum is not None and dv_sum is not None:
                dk.narrow(1, first, length).copy_(dk_sum)
                dv.narrow(1, first, length).copy_(dv_sum)
            del dk_sum, dv_sum
        return grad_query, grad_key, grad_value, None, None, None, None, None


def _length(sample: _Sample) -> int:
    return sample.length


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[heads, …] as [kv_heads, heads / kv_heads, …], a view."""
    return x.view(kv_heads, -1, *x.shape[1:])


class _Block:
    """Query rows [begin, end) of one sample, and the keys [first_key, end_key) that they may see.

    Both are computed in multiples of `ATTENTION_STEP`, which vector units want: rows of zeros are added, and keys of
    the samples beside this one are read along, hidden from every row. Neither adds anything but zeros to a result.
    """

    def __init__(self, begin: int, end: int, first_key: int, shift: int, window: int | None, keys: int) -> None:
        self.begin = begin
        self.end = end
        self.first_key = first_key
        self.end_key = end + shift
        self.window = window
        self._shift = shift
        self._width = min(in_attention_steps(self.end_key - first_key), keys)
        # To the right of the sample where the packed row goes on, else to its left.
        self._begin_keys = min(first_key, keys - self._width)

    def rows(self, x: Tensor, factor: float) -> Tensor:
        """The block's rows of x [kv_heads, group, tokens, dim] times `factor`, zeros below them; a copy."""
        count = self.end - self.begin
        out = x.new_empty(*x.shape[:2], in_attention_steps(count), x.shape[3])
        torch.mul(x.narrow(2, self.begin, count), factor, out=out.narrow(2, 0, count))
        if out.shape[2] > count:
            out.narrow(2, count, out.shape[2] - count).zero_()
        return out

    def write_rows(self, x: Tensor, values: Tensor) -> None:
        """Sets the block's rows of x [kv_heads, group, tokens, dim] to `values`, shaped as by `rows` or flat."""
        count = self.end - self.begin
        own = values.view(*x.shape[:2], -1, x.shape[3]).narrow(2, 0, count)
        x.narrow(2, self.begin, count).copy_(own)

    def keys(self, x: Tensor) -> Tensor:
        """The keys that are computed with, of x [kv_heads, tokens, dim]; a view."""
        return x.narrow(1, self._begin_keys, self._width)

    def own_keys(self, x: Tensor) -> Tensor:
        """Those of the sample, of what has the shape of `keys`."""
        return x.narrow(1, self.first_key - self._begin_keys, self.end_key - self.first_key)

    def probabilities(self, scaled: Tensor, keys: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
        """Softmax of the block's scores, [kv_heads, group, rows, keys], and the slope of the soft cap if there is one.

        Args:
            scaled: queries times the scale, [kv_heads, group, rows, head_dim].
            keys: [kv_heads, keys, head_dim].
            softcap: see `packed_attention`.
        """
        group, rows = scaled.shape[1:3]
        scores = torch.bmm(scaled.flatten(1, 2), keys.transpose(1, 2)).view(-1, group, rows, keys.shape[1])
        slope = None
        if softcap is not None:
            bent = scores.div_(softcap).tanh_()
            slope = 1 - bent.square()
            scores = bent * softcap
            del bent
        self._hide(scores)
        # In place: a row is read before it is written.
        return torch.softmax(scores, -1, out=scores), slope

    def _hide(self, scores: Tensor) -> None:
        """Adds -∞ where a row may not see a key. Adding is several times faster than filling by a mask of booleans."""
        rows, width = scores.shape[-2:]
        if self.window is None:
            lead = self.first_key - self._begin_keys
            if lead:
                scores.narrow(-1, 0, lead).fill_(float("-inf"))
            # Keys from that of the first row on; those that were read along behind the last one are among them.
            begin = self.begin + self._shift - self._begin_keys
            future = scores.new_full((rows, width - begin), float("-inf")).triu_(1)
            scores.narrow(-1, begin, width - begin).add_(future)
            return
        begin = self.begin + self._shift
        row = torch.arange(begin, begin + rows, device=scores.device).unsqueeze(1)
        column = torch.arange(self._begin_keys, self._begin_keys + width, device=scores.device)
        earliest = (row - self.window).clamp_(max=self.end_key - 1 - self.window)
        hidden = (column > row) | (column <= earliest) | (column < self.first_key)
        scores.masked_fill_(hidden, float("-inf"))


def _blocks(sample: _Sample, window: int | None, keys: int) -> list[_Block]:
    """The blocks of a sample, of so many keys in the whole row."""
    first, shift, end = sample.first_key, sample.shift, sample.start + sample.length
    return [
        _Block(
            begin,
            min(begin + ATTENTION_ROWS, end),
            first if window is None else max(first, begin + shift - window + 1),
            shift,
            window,
            keys,
        )
        for begin in range(sample.start, end, ATTENTION_ROWS)
    ]
