"""The tensors of Compacter; config, paper and counts are in edgepeft.methods.compacter.

A map of x [tokens, in] by `Σᵢ Aᵢ ⊗ (sᵢ tᵢ)` goes through three small products: x, cut into n pieces, times all sᵢ; each
result times its rule across the pieces; that times all tᵢ. No matrix of [in, out] exists.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from edgepeft.engine.methods import own_files
from edgepeft.engine.methods.adapter import Parts
from edgepeft.engine.methods.bottleneck import BottleneckUpdate, branches_of
from edgepeft.engine.methods.seeds import generator_of
from edgepeft.engine.model.load import LoadedModel
from edgepeft.methods.compacter import BRANCHES, CompacterConfig

RULES = "compacter_rules"
"""Name of the shared tensor, [n, n, n]."""

settings_of = own_files.settings_of


class KroneckerMap:
    """`x Σᵢ Aᵢ ⊗ (sᵢ tᵢ) + b`; see `bottleneck.Map`.

    Args:
        name: of the map, in the file.
        rules: A, [n, n, n]; shared.
        s: [n, in / n, rank].
        t: [n, rank, out / n].
    """

    def __init__(self, name: str, rules: nn.Parameter, s: Tensor, t: Tensor) -> None:
        self._name = name
        self._rules = rules
        self.s = nn.Parameter(s.to(rules.device))
        self.t = nn.Parameter(t.to(rules.device))
        self.bias = nn.Parameter(torch.zeros(t.shape[0] * t.shape[2], device=rules.device))

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """s, t and the bias."""
        return {f"{self._name}.s": self.s, f"{self._name}.t": self.t, f"{self._name}.bias": self.bias}

    def tensors(self) -> tuple[Tensor, ...]:
        """The rules too."""
        return self._rules, self.s, self.t, self.bias

    def apply(self, x: Tensor) -> Tensor:
        """See `Map`."""
        out = self._mixed(self._reduced(x)) @ self._wide_t(x.dtype)
        out = out.view(x.shape[0], -1)
        out += self.bias.to(x.dtype)
        return out

    def gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """See `Map`."""
        n, rank = self.s.shape[0], self.s.shape[2]
        pieces, g_pieces = self._pieces(x), self._pieces(g)
        reduced = self._reduced(x)
        mixed = self._mixed(reduced)
        grad_t = (mixed.t() @ g_pieces).to(self.t.dtype).view_as(self.t)
        del mixed
        g_mixed = self._cut(g_pieces @ self._wide_t(g.dtype).t())
        # A[i, p, a] joins piece p of the input with piece a of the result.
        grad_rules = torch.einsum("tpir,tair->ipa", self._cut(reduced), g_mixed).to(self._rules.dtype)
        g_reduced = torch.einsum("ipa,tair->tpir", self._rules.to(g.dtype), g_mixed).reshape(-1, n * rank)
        del g_mixed, reduced
        grad_s = (pieces.t() @ g_reduced).to(self.s.dtype).view(-1, n, rank).transpose(0, 1).contiguous()
        return grad_rules, grad_s, grad_t, g.sum(0, dtype=self.bias.dtype)

    def back(self, g: Tensor, onto: Tensor | None = None) -> Tensor:
        """See `Map`."""
        g_mixed = self._cut(self._pieces(g) @ self._wide_t(g.dtype).t())
        n, rank = self.s.shape[0], self.s.shape[2]
        g_reduced = torch.einsum("ipa,tair->tpir", self._rules.to(g.dtype), g_mixed).reshape(-1, n * rank)
        wide_s = self._wide_s(g.dtype).t()
        if onto is None:
            return (g_reduced @ wide_s).view(g.shape[0], -1)
        return torch.addmm(self._pieces(onto), g_reduced, wide_s).view(g.shape[0], -1)

    def _pieces(self, x: Tensor) -> Tensor:
        """[tokens, width] as [tokens · n, width / n]."""
        return x.reshape(-1, x.shape[1] // self.s.shape[0])

    def _cut(self, x: Tensor) -> Tensor:
        """[tokens · n, n · rank] as [tokens, n, n, rank]."""
        n, rank = self.s.shape[0], self.s.shape[2]
        return x.view(-1, n, n, rank)

    def _reduced(self, x: Tensor) -> Tensor:
        """Each piece times all s: [tokens · n, n · rank]."""
        return self._pieces(x) @ self._wide_s(x.dtype)

    def _mixed(self, reduced: Tensor) -> Tensor:
        """Each of them through its rule, across the pieces: [tokens · n, n · rank]."""
        n, rank = self.s.shape[0], self.s.shape[2]
        return torch.einsum("ipa,tpir->tair", self._rules.to(reduced.dtype), self._cut(reduced)).reshape(-1, n * rank)

    def _wide_s(self, dtype: torch.dtype) -> Tensor:
        """All s beside each other: [in / n, n · rank]."""
        return self.s.to(dtype).transpose(0, 1).reshape(self.s.shape[1], -1)

    def _wide_t(self, dtype: torch.dtype) -> Tensor:
        """All t above each other: [n · rank, out / n]."""
        return self.t.to(dtype).reshape(-1, self.t.shape[2])


def build(loaded: LoadedModel, config: CompacterConfig, seed: int) -> Parts:
    """See `EngineMethod`: rules and factors drawn so that a map keeps its input's size; t of the maps up is zero.

    Raises:
        UsageError: the number of products does not divide the model's width, or its layers have no known branches.
    """
    hidden, width = loaded.shape.hidden, config.width(loaded.shape.hidden)
    n, rank = config.products, config.rank
    rules = nn.Parameter(torch.empty(n, n, n).normal_(std=1 / n, generator=generator_of(seed, RULES)).to(loaded.device))

    def factor(shape: tuple[int, int, int], name: str) -> Tensor:
        bound = math.sqrt(3 / shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator_of(seed, name))

    def update(path: str) -> BottleneckUpdate:
        down = KroneckerMap(
            "adapter_down",
            rules,
            factor((n, hidden // n, rank), f"{path}.down.s"),
            factor((n, rank, width // n), f"{path}.down.t"),
        )
        up = KroneckerMap(
            "adapter_up", rules, factor((n, width // n, rank), f"{path}.up.s"), torch.zeros(n, rank, hidden // n)
        )
        return BottleneckUpdate(down, up, (config.activation, "none"), config.scale, reads_output=True)

    return Parts({path: update(path) for path in branches_of(loaded, BRANCHES)}, {RULES: rules})


restore = partial(own_files.restore_own, CompacterConfig, build)
