"""LLaMA-Factory's plain way: transformers' own decoder layers, peft's formula for adapters, autocast, full logits."""

import torch
import transformers
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from accuracy.published_parts import Nf4, attention, frozen_linear, shifted_loss, weight
from accuracy.published_torchtune import LINEARS, sizes_of_linears

_PLACES = dict(
    zip(
        LINEARS,
        (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        ),
        strict=True,
    )
)  # fmt: skip


class _Linear(torch.nn.Module):
    """A frozen matrix and a float32 adapter: the result is copied first where the matrix has 4 bit, x goes to float32
    where it has 16."""

    def __init__(self, sizes, technique, *, adapted):
        super().__init__()
        outputs, inputs = sizes
        self.base = Nf4(outputs, inputs) if technique["nf4"] else weight(outputs, inputs)
        self.adapted = adapted
        if adapted:
            self.a = weight(technique["rank"], inputs, dtype=torch.float32, trained=True)
            self.b = weight(outputs, technique["rank"], dtype=torch.float32, trained=True)

    def forward(self, x):
        result = frozen_linear(x, self.base, bitsandbytes=True)
        if not self.adapted:
            return result
        if isinstance(self.base, Nf4):
            result = result.clone()
        else:
            x = x.to(self.a.dtype)
        return result + F.linear(F.linear(x, self.a), self.b) * 2


def _flash(module, query, key, value, attention_mask, **options):
    return attention(query, key, value, "flash").transpose(1, 2).contiguous(), None


class _Layer(torch.nn.Module):
    def __init__(self, config, shape, technique):
        super().__init__()
        self.inner = LlamaDecoderLayer(config, 0)
        sizes = sizes_of_linears(shape)
        for letter, place in _PLACES.items():
            self.inner.set_submodule(place, _Linear(sizes[letter], technique, adapted=letter in technique["targets"]))
        for parameter in self.inner.parameters():
            parameter.requires_grad_(parameter.dtype == torch.float32)

    def forward(self, x, cos, sin):
        return self.inner(x, attention_mask=None, position_embeddings=(cos, sin))


class Model(torch.nn.Module):
    """`layers` of the shape's layers. `ids` and `labels` are [B, L]."""

    inputs_require_gradients = True

    def __init__(self, shape, technique, layers):
        super().__init__()
        transformers.AttentionInterface.register("published", _flash)
        config = transformers.LlamaConfig(
            vocab_size=shape["vocab"],
            hidden_size=shape["hidden"],
            intermediate_size=shape["intermediate"],
            num_hidden_layers=layers,
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv_heads"],
            max_position_embeddings=shape["positions"],
            attn_implementation="published",
        )
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            self.layers = torch.nn.ModuleList(_Layer(config, shape, technique) for _ in range(layers))
            self.norm = LlamaRMSNorm(shape["hidden"]).requires_grad_(False)
        finally:
            torch.set_default_dtype(before)
        self.rotation = LlamaRotaryEmbedding(config)
        self.embedding = weight(shape["vocab"], shape["hidden"])
        self.head = weight(shape["vocab"], shape["hidden"])

    def in_each_layer(self, longest):
        """Sizes of what the model itself does not show."""
        return []

    def context(self):
        """What the whole forward runs in."""
        return torch.autocast("cpu", dtype=torch.bfloat16)

    def begin(self, ids):
        """What goes into the layers: the hidden states, and what each layer takes beside."""
        hidden = F.embedding(ids, self.embedding)
        return hidden, self.rotation(hidden, torch.empty_like(ids[:1]))

    def end(self, hidden, labels, marks, context):
        """The loss; nothing else is held while backward runs."""
        hidden = self.norm(hidden)
        logits = F.linear(hidden, self.head)
        logits = logits.float()
        marks.enter(("loss",))
        return shifted_loss(logits, labels), None
