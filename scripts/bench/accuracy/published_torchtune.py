"""torchtune's decoder as far as memory depends on it: its formulas for norm, rotation, attention, LoRA and loss."""

import torch
from torch.nn import functional as F

from accuracy.published_compiled import compiled
from accuracy.published_parts import Nf4, attention, frozen_linear, weight

_GRAPHS = {}
"""Compiled pieces by what decides about them."""
CHUNKS = 8
"""Of the logits in CEWithChunkedOutputLoss."""
LINEARS = "qkvogud"
"""Letters of a layer's linears: queries, keys, values, output; gate, up, down."""


def sizes_of_linears(shape):
    """(outputs, inputs) of each linear by its letter, the head `h` among them."""
    head_dim = shape["hidden"] // shape["heads"]
    hidden, wide, narrow = shape["hidden"], shape["intermediate"], head_dim * shape["kv_heads"]
    return {
        "q": (hidden, hidden),
        "k": (narrow, hidden),
        "v": (narrow, hidden),
        "o": (hidden, hidden),
        "g": (wide, hidden),
        "u": (wide, hidden),
        "d": (hidden, wide),
        "h": (shape["vocab"], hidden),
    }


class _Linear(torch.nn.Module):
    def __init__(self, sizes, technique, *, adapted):
        super().__init__()
        outputs, inputs = sizes
        self.base = Nf4(outputs, inputs) if technique["nf4"] else weight(outputs, inputs, trained=technique["full"])
        self.adapted = adapted
        if adapted:
            self.a = weight(technique["rank"], inputs, trained=True)
            self.b = weight(outputs, technique["rank"], trained=True)

    def tensors(self):
        base = self.base.codes if isinstance(self.base, Nf4) else self.base
        return [base, self.a, self.b] if self.adapted else [base]

    def formula(self):
        """x and its tensors in, the result out; a pure function, so that layers share one compiled graph."""
        nf4, adapted = self.base if isinstance(self.base, Nf4) else None, self.adapted

        def apply(x, base, a=None, b=None):
            out = F.linear(x, base) if nf4 is None else frozen_linear(x, _Codes(base, nf4.shape))
            return out + 2 * F.linear(F.linear(x, a), b) if adapted else out

        return apply

    def forward(self, x):
        return self.formula()(x, *self.tensors())


class _Codes(Nf4):
    """An `Nf4` whose codes are given."""

    def __init__(self, codes, shape):
        torch.nn.Module.__init__(self)
        self.codes, self.shape = codes, shape


def _norm(x, scale):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).type_as(x) * scale


def _rotate(x, table, positions):
    # x [B, L, heads, D]; the table [positions, D/2, 2] is float32, and gathered only where rows are packed.
    angles = table[: x.size(1)] if positions is None else table[positions]
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    angles = angles.view(-1, pairs.size(1), 1, pairs.size(3), 2)
    turned = torch.stack(
        [
            pairs[..., 0] * angles[..., 0] - pairs[..., 1] * angles[..., 1],
            pairs[..., 1] * angles[..., 0] + pairs[..., 0] * angles[..., 1],
        ],
        -1,
    )
    return turned.flatten(3).type_as(x)


def _as_it_is(function):
    return function


class _Layer(torch.nn.Module):
    """Compiled as two pieces around the attention kernel."""

    def __init__(self, shape, technique, shared):
        super().__init__()
        sizes = sizes_of_linears(shape)
        self.norms = torch.nn.ParameterList(weight(shape["hidden"], trained=technique["full"]) for _ in range(2))
        self.linears = torch.nn.ModuleDict(
            {letter: _Linear(sizes[letter], technique, adapted=letter in technique["targets"]) for letter in LINEARS}
        )
        self._shape, self._kind, self._compiled = shape, technique["attention"], technique["compiled"]
        self._shared = shared

    def _before(self):
        heads, kv_heads = self._shape["heads"], self._shape["kv_heads"]
        head_dim = self._shape["hidden"] // heads
        linears = [(self.linears[letter].formula(), len(self.linears[letter].tensors())) for letter in "qkv"]

        def before(x, scale, table, positions, *tensors):
            batch, length, _ = x.shape
            normed = _norm(x, scale)
            results = []
            for formula, count in linears:
                results.append(formula(normed, *tensors[:count]).view(batch, length, -1, head_dim))
                tensors = tensors[count:]
            q, k, v = results
            q, k = _rotate(q, table, positions).transpose(1, 2), _rotate(k, table, positions).transpose(1, 2)
            v = v.transpose(1, 2)
            if heads != kv_heads:
                spread = (batch, kv_heads, heads // kv_heads, length, head_dim)
                k = k.unsqueeze(2).expand(spread).flatten(1, 2)
                v = v.unsqueeze(2).expand(spread).flatten(1, 2)
            return q, k, v

        return before

    def _after(self):
        linears = {letter: (self.linears[letter].formula(), len(self.linears[letter].tensors())) for letter in "ogud"}

        def after(x, attended, scale, *tensors):
            parts = {}
            for letter, (formula, count) in linears.items():
                parts[letter] = formula, tensors[:count]
                tensors = tensors[count:]

            def linear(letter, value):
                formula, own = parts[letter]
                return formula(value, *own)

            batch, heads, length, head_dim = attended.shape
            merged = attended.transpose(1, 2).contiguous().view(batch, length, heads * head_dim)
            h = linear("o", merged) + x
            normed = _norm(h, scale)
            return h + linear("d", F.silu(linear("g", normed)) * linear("u", normed))

        return after

    def forward(self, x, table, positions):
        # The first layer of a frozen embedding gets a graph of its own, since its input needs no gradient.
        if x.requires_grad not in self._shared:
            wrap = compiled if self._compiled else _as_it_is
            self._shared[x.requires_grad] = wrap(self._before()), wrap(self._after())
        before, after = self._shared[x.requires_grad]
        first = [tensor for letter in "qkv" for tensor in self.linears[letter].tensors()]
        second = [tensor for letter in "ogud" for tensor in self.linears[letter].tensors()]
        q, k, v = before(x, self.norms[0], table, positions, *first)
        attended = attention(q, k, v, self._kind)
        del q, k, v
        return after(x, attended, self.norms[1], *second)


class Model(torch.nn.Module):
    """`layers` of the shape's layers. `ids` and `labels` are [B, L]."""

    def __init__(self, shape, technique, layers):
        super().__init__()
        full = technique["full"]
        self.embedding = weight(shape["vocab"], shape["hidden"], trained=full)
        # Techniques that differ outside of the layers share their graphs.
        inside = ("compiled", "attention", "full", "nf4", "rank", "targets", "seq_len", "micro_batch")
        graphs = _GRAPHS.setdefault(repr((shape, [technique[key] for key in inside])), {})
        self.layers = torch.nn.ModuleList(_Layer(shape, technique, graphs) for _ in range(layers))
        self.norm = weight(shape["hidden"], trained=full)
        self.head = None
        if not shape["tied"]:
            plain = {**technique, "nf4": False}
            self.head = _Linear(sizes_of_linears(shape)["h"], plain, adapted="h" in technique["targets"])
        half = shape["hidden"] // shape["heads"] // 2
        self.register_buffer("table", torch.empty(shape["positions"], half, 2))
        self._copies = [4 * self.table.numel()] if technique["table_in_each_layer"] else []
        self._packed = technique["attention"] != "flash"
        self._loss = technique["loss"]
        self._chunk_loss = _chunk_loss
        if technique["compiled"] and self._loss == "chunked":
            key = repr([shape["vocab"], technique["seq_len"], technique["micro_batch"]])
            self._chunk_loss = _GRAPHS.setdefault(key, compiled(_chunk_loss))

    def in_each_layer(self, longest):
        """Sizes of what the model itself does not show."""
        return self._copies

    def begin(self, ids):
        """What goes into the layers: the hidden states, and what each layer takes beside."""
        positions = torch.empty_like(ids) if self._packed else None
        return F.embedding(ids, self.embedding), (self.table, positions)

    def end(self, hidden, labels, marks, context):
        """The loss, and what the recipe still holds while backward runs."""
        with context:
            hidden = _norm(hidden, self.norm)
        # The head's inputs are never offloaded.
        if self._loss == "chunked":
            logits = [self._logits(chunk) for chunk in hidden.chunk(CHUNKS, dim=1)]
        else:
            logits = self._logits(hidden).float()
        del hidden
        marks.enter(("loss",))
        if self._loss == "shifted":
            logits = logits[..., :-1, :].contiguous()
            logits = logits.transpose(1, 2)
            # The kernel makes its input contiguous for itself.
            return F.cross_entropy(logits.contiguous(), labels[..., 1:].contiguous()), logits
        labels = torch.hstack((labels[..., 1:], labels[..., :1]))
        if self._loss == "flat":
            loss = F.cross_entropy(logits.reshape(-1, logits.size(-1)), labels.reshape(-1))
            return loss, None
        total = 0.0
        rows = [chunk.reshape(-1, chunk.size(-1)) for chunk in logits]
        for chunk, its_labels in zip(rows, labels.chunk(CHUNKS, dim=1), strict=True):
            total += self._chunk_loss(chunk, its_labels.reshape(-1))
        return total, None

    def _logits(self, hidden):
        return F.linear(hidden, self.embedding) if self.head is None else self.head(hidden)


def _chunk_loss(logits, labels):
    return F.cross_entropy(logits.float(), labels, reduction="sum")
