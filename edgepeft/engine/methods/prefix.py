"""The tensors of prefix tuning; config, paper and counts are in edgepeft.methods.prefix.

Each layer trains its keys and its values, [tokens, kv_heads, head_dim] each. Reparameterised, they are
`tanh(E Dᵀ + d) Uᵀ + u` with E [tokens, key], D [width, key] for all layers and U [2 · key, width] of each, key being
kv_heads · head_dim; the last entries are those of the values. All of that is float32.

PEFT's file has one tensor, `prompt_embeddings` [tokens, 2 · layers · key]: for each token the keys and the values of
the first layer, then those of the next. A reparameterised prefix is written as what it makes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import DynamicCache

from edgepeft.engine.methods.adapter import AttachedAdapter, Parts, check_tensors
from edgepeft.engine.methods.seeds import generator_of
from edgepeft.engine.model.load import LoadedModel
from edgepeft.engine.model.prefix import PrefixSite
from edgepeft.errors import BadInput, UsageError
from edgepeft.library.store import CONFIG_FILE, WEIGHTS_FILE
from edgepeft.methods import count_parameters
from edgepeft.methods.prefix import PrefixConfig

FILE_KEY = "prompt_embeddings"
"""PEFT's name of the one tensor."""
ATTENTIONS = frozenset(
    f"{family}Attention"
    for family in (
        *("Llama", "Mistral", "Ministral", "Ministral3", "Mixtral", "SmolLM3", "Granite", "Phi3", "StableLm"),
        *("Qwen2", "Qwen3", "Qwen2Moe", "Qwen3Moe", "Gemma", "Gemma2", "Gemma3", "Olmo", "Olmo2", "Olmo3"),
    )
)
"""transformers' classes (5.23) that put what they are given into the cache before they attend to all of it."""


class PrefixUpdate:
    """Keys and values of one layer, each trained by itself."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = nn.Parameter(keys)
        self.values = nn.Parameter(values)
        self.tokens = keys.shape[0]

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """Both."""
        return {"keys": self.keys, "values": self.values}

    def tensors(self) -> tuple[Tensor, ...]:
        """Both."""
        return self.keys, self.values

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """See `engine.model.prefix.PrefixUpdate`."""
        return self.keys, self.values


class ReparameterisedUpdate:
    """Keys and values of one layer, made of an embedding that all layers share.

    Args:
        shared: E, D and d.
        up: U.
        kv_heads: of the model.
    """

    def __init__(self, shared: tuple[nn.Parameter, ...], up: Tensor, kv_heads: int) -> None:
        self.shared = shared
        self.up = nn.Parameter(up)
        self.bias = nn.Parameter(torch.zeros(up.shape[0], device=up.device))
        self.tokens = shared[0].shape[0]
        self._kv_heads = kv_heads

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """Those of this layer."""
        return {"up.weight": self.up, "up.bias": self.bias}

    def tensors(self) -> tuple[Tensor, ...]:
        """Those of this layer and the shared ones."""
        return *self.shared, self.up, self.bias

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """See `engine.model.prefix.PrefixUpdate`."""
        made: Any = _Reparameterised.apply
        keys, values = made(*self.tensors())
        return keys.view(self.tokens, self._kv_heads, -1), values.view(self.tokens, self._kv_heads, -1)


class _Reparameterised(torch.autograd.Function):
    """Keys and values [tokens, key] each, of E, D, d, U and u; keeps what the tanh made."""

    @staticmethod
    def forward(
        ctx: Any, embedding: Tensor, down: Tensor, bias: Tensor, up: Tensor, up_bias: Tensor
    ) -> tuple[Tensor, ...]:
        hidden = torch.addmm(bias, embedding, down.t()).tanh_()
        ctx.save_for_backward(hidden, embedding, down, up)
        weights, biases = up.chunk(2), up_bias.chunk(2)
        return tuple(torch.addmm(b, hidden, w.t()) for w, b in zip(weights, biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        hidden, embedding, down, up = ctx.saved_tensors
        grad_up, grad_up_bias = torch.empty_like(up), up.new_empty(up.shape[0])
        g_hidden = torch.zeros_like(hidden)
        for g, weight, to, to_bias in zip(gradients, up.chunk(2), grad_up.chunk(2), grad_up_bias.chunk(2), strict=True):
            torch.mm(g.t(), hidden, out=to)
            torch.sum(g, 0, out=to_bias)
            g_hidden.addmm_(g, weight)
        torch.ops.aten.tanh_backward.grad_input(g_hidden, hidden, grad_input=g_hidden)
        return g_hidden @ down, g_hidden.t() @ embedding, g_hidden.sum(0), grad_up, grad_up_bias


def build(loaded: LoadedModel, config: PrefixConfig, seed: int) -> Parts:
    """See `EngineMethod`: the keys and values of random tokens; reparameterised, of random maps, as PEFT's are.

    Raises:
        UsageError: the attention of the model is not known here, or the context has no place for the prefix.
    """
    sites = _sites(loaded, config)
    if not config.reparameterised:
        return _parts({site.name: PrefixUpdate(*made) for site, made in _started(loaded, sites, config, seed)})
    key, width = loaded.shape.kv_heads * loaded.shape.head_dim, config.width

    def drawn(name: str, rows: int, columns: int) -> Tensor:
        weight = torch.empty(rows, columns)
        return nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator_of(seed, name)).to(loaded.device)

    embedding = torch.randn(config.tokens, key, generator=generator_of(seed, "prefix")).to(loaded.device)
    shared = {
        "prefix.embedding": nn.Parameter(embedding),
        "prefix.down.weight": nn.Parameter(drawn("prefix.down", width, key)),
        "prefix.down.bias": nn.Parameter(torch.zeros(width, device=loaded.device)),
    }
    updates = {
        site.name: ReparameterisedUpdate(
            tuple(shared.values()), drawn(site.name, 2 * key, width), loaded.shape.kv_heads
        )
        for site in sites
    }
    return _parts(updates, shared)


def _sites(loaded: LoadedModel, config: PrefixConfig) -> list[PrefixSite]:
    """One of each layer.

    Raises:
        UsageError: see `build`.
    """
    count_parameters(config, loaded.shape)
    sites = list(loaded.prefixes().values())
    unknown = [site.attention for site in sites if site.attention not in ATTENTIONS]
    if unknown or len(sites) != len(loaded.layers):
        raise UsageError(
            f"it is not known how {unknown[0] if unknown else type(loaded.model).__name__} takes a prefix",
            where="--method",
            hint="Use lora, which changes linear layers",
        )
    return sites


@torch.no_grad()
def _started(
    loaded: LoadedModel, sites: list[PrefixSite], config: PrefixConfig, seed: int
) -> list[tuple[PrefixSite, tuple[Tensor, Tensor]]]:
    """What the model puts into its cache for the token that begins a text, if it has one, and random ones."""
    ids = torch.randint(0, loaded.shape.vocab, (1, config.tokens), generator=generator_of(seed, "prefix"))
    begin = getattr(loaded.model.config, "bos_token_id", None)
    if isinstance(begin, int) and 0 <= begin < loaded.shape.vocab:
        ids[0, 0] = begin
    cache = DynamicCache()
    with _base_alone(loaded):
        loaded.decoder(input_ids=ids.to(loaded.device), past_key_values=cache, use_cache=True)
    found = []
    for site, layer in zip(sites, cache.layers, strict=True):
        keys, values = (x[0].transpose(0, 1).float().contiguous() for x in (layer.keys, layer.values))
        found.append((site, (keys, values)))
    return found


@contextmanager
def _base_alone(loaded: LoadedModel) -> Iterator[None]:
    """Within it, no adapter acts."""
    before = [(site, site.active) for site in loaded.sites().values()]
    for site, _ in before:
        site.activate([])
    try:
        yield
    finally:
        for site, active in before:
            site.activate(active)


def _parts(
    updates: Mapping[str, PrefixUpdate | ReparameterisedUpdate],
    shared: Mapping[str, nn.Parameter] | None = None,
) -> Parts:
    def written() -> dict[str, Tensor]:
        with torch.no_grad():
            made = [x.flatten(1) for update in updates.values() for x in update.keys_and_values()]
        return {FILE_KEY: torch.cat(made, dim=1)}

    return Parts(updates, shared or {}, written)


def settings_of(adapter: AttachedAdapter) -> dict[str, Any]:
    """See `EngineMethod`."""
    updates: list[Any] = list(adapter.updates.values())
    tokens, kv_heads, head_dim = updates[0].keys_and_values()[0].shape
    return {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": tokens,
        "num_layers": len(updates),
        "token_dim": kv_heads * head_dim,
        "num_attention_heads": kv_heads,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
        "encoder_hidden_size": kv_heads * head_dim,
    }


def tokens_of(settings: Mapping[str, Any], where: str) -> int:
    """How many tokens stand before each sample, of a prefix or a prompt.

    Raises:
        BadInput: the settings do not say, or it is for another kind of model.
    """
    tokens = settings.get("num_virtual_tokens")
    if isinstance(tokens, bool) or not isinstance(tokens, int):
        raise BadInput("num_virtual_tokens must be a whole number", where=where, hint="Save the adapter anew")
    if settings.get("num_transformer_submodules") not in (None, 1):
        raise BadInput("it is for an encoder and a decoder", where=where, hint="Use one for a causal model")
    return tokens


def restore(
    loaded: LoadedModel, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> tuple[PrefixConfig, Parts]:
    """See `EngineMethod`; the prefix, whatever made it."""
    where, shape = str(folder / CONFIG_FILE), loaded.shape
    tokens = tokens_of(settings, where)
    try:
        config = PrefixConfig(tokens)
        sites = _sites(loaded, config)
    except UsageError as error:
        raise BadInput(error.what, where=where, hint="It belongs to another base, or is damaged") from error
    expected = (tokens, 2 * shape.layers * shape.kv_heads * shape.head_dim)
    check_tensors(tensors, {FILE_KEY: expected}, where=str(folder / WEIGHTS_FILE))
    values = tensors[FILE_KEY].to(loaded.device, torch.float32).view(tokens, -1, shape.kv_heads, shape.head_dim)
    # Each in memory of its own, which training changes.
    parts = [x.squeeze(1).clone(memory_format=torch.contiguous_format) for x in values.split(1, dim=1)]
    pairs = zip(sites, parts[::2], parts[1::2], strict=True)
    return config, _parts({site.name: PrefixUpdate(keys, of_values) for site, keys, of_values in pairs})
