"""Keys and values that stand before every sample in the attention of a layer (prefix tuning, arXiv 2101.00190).

In packed rows the attention function puts them in front of each sample's own (engine.training.attention). Elsewhere the
decoder's entry puts them into the cache before the first token, counts positions from behind them, and lets the mask of
a padded batch see them; a caller need not know of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache

PACKED = "edgepeft_packed"
"""The name under which the attention of packed rows is registered with transformers."""
_SITE = "edgepeft_prefix"
"""Attribute of an attention layer that holds its site."""


class PrefixUpdate(Protocol):
    """What one adapter puts before the samples in one layer."""

    tokens: int
    """Keys, and as many values."""

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """[tokens, kv_heads, head_dim] each; recorded by autograd."""
        ...


class PrefixSite:
    """The place before the samples in the attention of one layer; prefixes stand there one after another.

    Args:
        module: the attention layer.
        name: its path in the model.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.name = f"{name}.prefix"
        self.attention = type(module).__name__
        """Class of the layer."""
        self.adapters: dict[str, PrefixUpdate] = {}
        self.active: list[tuple[str, float]] = []
        setattr(module, _SITE, self)

    def activate(self, active: Sequence[tuple[str, float]]) -> None:
        """See `Site`."""
        self.active = list(active)

    @property
    def tokens(self) -> int:
        """Keys of all active adapters."""
        return sum(self.adapters[name].tokens for name, _ in self.active)

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """Those of all active adapters, [tokens, kv_heads, head_dim] each; values times the strength of use."""
        found = []
        for name, scale in self.active:
            keys, values = self.adapters[name].keys_and_values()
            found.append((keys, values if scale == 1 else values * scale))
        if len(found) == 1:
            return found[0]
        return torch.cat([keys for keys, _ in found]), torch.cat([values for _, values in found])


def prefix_of(module: nn.Module) -> PrefixSite | None:
    """What stands before the samples in an attention layer now; None where nothing does."""
    site: PrefixSite | None = module.__dict__.get(_SITE)
    return site if site is not None and site.active else None


class PrefixedDecoder:
    """The decoder's entry: outside of packed rows every cache begins with the active prefixes.

    Args:
        decoder: the inner model; its forward is replaced on the instance.
        sites: by path, one for each layer, in order.
        dtype: of keys and values.
    """

    def __init__(self, decoder: nn.Module, sites: Mapping[str, PrefixSite], dtype: torch.dtype) -> None:
        self._config: Any = getattr(decoder, "config", None)
        self._sites = list(sites.values())
        self._dtype = dtype
        self._forward: Any = decoder.forward
        decoder.__dict__["forward"] = self._run

    @property
    def tokens(self) -> int:
        """Places that the active prefixes take."""
        return self._sites[0].tokens if self._sites else 0

    def _run(self, *arguments: Any, **options: Any) -> Any:
        count = self.tokens
        if not count or self._config._attn_implementation == PACKED:
            return self._forward(*arguments, **options)
        ids = arguments[0] if arguments else options.get("input_ids")
        given: Tensor = options["inputs_embeds"] if ids is None else ids
        cache = options.get("past_key_values")
        if cache is None:
            cache = options["past_key_values"] = DynamicCache()
        if not cache.get_seq_length():
            self._fill(cache, given.shape[0])
        mask, positions = options.get("attention_mask"), options.get("position_ids")
        if mask is not None:
            options["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], count), mask], dim=1)
        if positions is not None:
            options["position_ids"] = positions + count
        return self._forward(*arguments, **options)

    def _fill(self, cache: Any, rows: int) -> None:
        for layer, site in enumerate(self._sites):
            keys, values = (x.to(self._dtype).transpose(0, 1).expand(rows, -1, -1, -1) for x in site.keys_and_values())
            cache.update(keys, values, layer)
