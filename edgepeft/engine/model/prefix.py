"""Keys and values that stand before every sample in the attention of a layer (prefix tuning, arXiv 2101.00190).

In packed rows the attention function puts them in front of each sample's own (engine.training.attention). Elsewhere
they begin the cache (engine.model.entry).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

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
