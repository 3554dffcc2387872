"""The tensors of LoRA; its config, paper and counts are in edgepeft.methods.lora.

`x Wᵀ + s (x Aᵀ) Bᵀ` with A [rank, in] and B [out, rank]. A and B and their gradients are float32; products run in the
compute dtype, always through the small rank first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgepeft.engine.methods.adapter import Parts, Update
from edgepeft.engine.methods.dora import DoraUpdate, squared_lengths
from edgepeft.engine.methods.dropout import PackedSamples, current_samples
from edgepeft.engine.methods.lora_files import read_modules, settings_of
from edgepeft.engine.methods.lora_tables import EmbeddingLora
from edgepeft.engine.methods.seeds import generator_of
from edgepeft.engine.methods.targets import adaptable, resolve_targets, targeted_tables
from edgepeft.engine.model.linear import AdaptedLinear, LinearUpdate, Use
from edgepeft.engine.model.load import LoadedModel
from edgepeft.engine.model.tables import AdaptedTable, LowRank
from edgepeft.methods.lora import LoraConfig
from edgepeft.methods.targets import table_of

__all__ = ["LoraUpdate", "build", "restore", "settings_of"]


def build(loaded: LoadedModel, config: LoraConfig, seed: int) -> Parts:
    """See `EngineMethod`.

    Raises:
        UsageError: a target matches no linear layer, or the rank exceeds a targeted dimension.
    """
    linears, tables = loaded.linears(), targeted_tables(config.targets, loaded.tables())
    targeted = resolve_targets([name for name in config.targets if table_of(name) is None], adaptable(linears))
    sizes = {path: min(linears[path].weight_source.shape) for path in targeted}
    config.check_ranks(sizes | {path: min(table.own.shape) for path, table in tables.items()})
    updates: dict[str, Update] = {}
    for path, table in tables.items():
        if table.reads_ids:
            updates[path] = _fresh_embedding(config, table, seed, loaded)
    for path in targeted:
        linear = linears[path]
        lora = LoraUpdate.initialised(config, linear.weight_source.shape, path, seed, loaded.device)
        updates[path] = DoraUpdate(lora, linear, _squares(linear, loaded)) if config.dora else lora
    for path, table in tables.items():
        if not table.reads_ids:
            updates[path] = LoraUpdate.initialised(config, _shape(table), path, seed, loaded.device)
    return Parts(updates)


def _fresh_embedding(config: LoraConfig, table: AdaptedTable, seed: int, loaded: LoadedModel) -> EmbeddingLora:
    rank = config.rank_of(table.name)
    return EmbeddingLora.initialised(rank, config.scale_of(rank), _shape(table), table.name, seed, loaded.device)


def _shape(table: AdaptedTable) -> tuple[int, int]:
    vocabulary, hidden = table.own.shape
    return vocabulary, hidden


def restore(
    loaded: LoadedModel, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> tuple[LoraConfig, Parts]:
    """See `EngineMethod`."""
    linears = loaded.linears()
    config, modules = read_modules(settings, tensors, loaded, folder)
    updates: dict[str, Update] = {}
    for path, module in modules.items():
        A, B = (_parameter(x, loaded) for x in (module.A, module.B))
        if module.of_embedding:
            updates[path] = EmbeddingLora(A, B, module.factor)
            continue
        lora = updates[path] = LoraUpdate(A, B, module.factor, path, config.dropout)
        if module.magnitude is not None:
            linear = linears[path]
            updates[path] = DoraUpdate(lora, linear, _squares(linear, loaded), _parameter(module.magnitude, loaded))
    return config, Parts(updates)


def _parameter(value: Tensor, loaded: LoadedModel) -> nn.Parameter:
    return nn.Parameter(value.to(loaded.device, torch.float32, copy=True))


def _squares(linear: AdaptedLinear, loaded: LoadedModel) -> Tensor:
    return squared_lengths(linear.weight_source, loaded.workspace.dtype)


class LoraUpdate(LinearUpdate):
    """A and B of one linear layer (Hu et al. 2021, arXiv 2106.09685).

    `factor` is the trained scale s of this module; dropout acts on the update's input as in PEFT.
    """

    keeps_input = True
    alters = ("weight",)

    def __init__(self, A: nn.Parameter, B: nn.Parameter, factor: float, module: str, dropout: float = 0.0) -> None:
        self.A = A
        self.B = B
        self.factor = factor
        self.module = module
        self.dropout = dropout

    @classmethod
    def initialised(
        cls, config: LoraConfig, shape: tuple[int, int], module: str, seed: int, device: torch.device
    ) -> LoraUpdate:
        """A uniform within ±1/√in as PEFT draws it, B zero, for a weight of `shape` [out, in].

        The draw depends on the seed and the module's name alone, not on the order in which modules are visited.
        """
        out_features, in_features = shape
        rank = config.rank_of(module)
        A = torch.empty(rank, in_features)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator_of(seed, module))
        B = torch.zeros(out_features, rank)
        trained = nn.Parameter(A.to(device)), nn.Parameter(B.to(device))
        return cls(*trained, config.scale_of(rank), module, config.dropout)

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """A and B under the names that PEFT's files use."""
        return {"lora_A.weight": self.A, "lora_B.weight": self.B}

    def tensors(self) -> tuple[Tensor, ...]:
        """A and B."""
        return self.A, self.B

    def low_rank(self, scale: float) -> LowRank:
        """See `HeadUpdate`: the same where the linear is the output head."""
        return LowRank(self.A, self.B, self.factor * scale, self._mask_of if self.dropout else None)

    def _mask_of(self, hidden: Tensor) -> Tensor | None:
        samples = current_samples()
        return None if samples is None else self.mask(samples, hidden)

    def add_forward(self, x: Tensor, y: Tensor, scale: float) -> tuple[Tensor, ...]:
        """y += s (x Aᵀ) Bᵀ; keeps x Aᵀ, of [tokens, rank]."""
        samples = current_samples() if self.dropout else None
        if samples is not None:
            x = x * self.mask(samples, x)
        inner = x @ self.A.to(x.dtype).t()
        y.addmm_(inner, self.B.to(x.dtype).t(), alpha=self.factor * scale)
        return (inner,)

    def add_backward(
        self, x: Tensor | None, g: Tensor, grad_x: Tensor | None, scale: float, kept: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """dB = s gᵀ(x Aᵀ), dA = s (g B)ᵀ x, and s (g B) A is added to grad_x."""
        samples = current_samples() if self.dropout else None
        (inner,) = kept
        factor = self.factor * scale
        g_inner = (g @ self.B.to(g.dtype)).mul_(factor)
        mask = None if samples is None else self.mask(samples, g, self.A.shape[1])
        if grad_x is not None:
            if mask is None:
                grad_x.addmm_(g_inner, self.A.to(g.dtype))
            else:
                grad_x += (g_inner @ self.A.to(g.dtype)).mul_(mask)
        if x is None:
            return None, None
        seen = x if mask is None else x * mask
        grad_B = (g.t() @ inner).to(self.B.dtype).mul_(factor)
        return (g_inner.t() @ seen).to(self.A.dtype), grad_B

    def merge_into(self, parameter: str, values: Tensor, rows: slice) -> None:
        """W += s B A; see `Mergeable`."""
        with torch.no_grad():
            values.addmm_(self.B[rows].float(), self.A.float(), alpha=self.factor)

    def together(self, uses: Sequence[Use]) -> _SharedLora | None:
        """Products with all A at once, where nothing is dropped from their input."""
        updates = [use.update for use in uses if isinstance(use.update, LoraUpdate)]
        if current_samples() is not None and any(update.dropout for update in updates):
            return None
        return _SharedLora(updates, [use.scale for use in uses])

    def mask(self, samples: PackedSamples, like: Tensor, width: int | None = None) -> Tensor:
        """What dropout multiplies the input with: [tokens, width] in `like`'s dtype, as wide as it where not said."""
        if samples.tokens != like.shape[0]:
            raise ValueError(f"the dropout context names {samples.tokens} tokens, the layer has {like.shape[0]}")
        return samples.mask(self.module, width or like.shape[1], self.dropout, device=like.device, dtype=like.dtype)


class _SharedLora:
    """LoRA on several linears that read the same x: one product with all A above each other, one for all dA.

    A product as narrow as one rank uses little of a processor; all of them together cost hardly more.
    """

    def __init__(self, updates: Sequence[LoraUpdate], scales: Sequence[float]) -> None:
        self._updates = updates
        self._factors = [update.factor * scale for update, scale in zip(updates, scales, strict=True)]
        self._ranks = [int(update.A.shape[0]) for update in updates]

    def add_forward(self, x: Tensor, ys: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Each y += s (x Aᵀ) Bᵀ; keeps x Aᵀ, of [tokens, sum of ranks]."""
        inner = x @ self._stacked_a(x.dtype).t()
        for update, factor, part, y in zip(self._updates, self._factors, inner.split(self._ranks, 1), ys, strict=True):
            y.addmm_(part, update.B.to(x.dtype).t(), alpha=factor)
        return (inner,)

    def add_backward(
        self, x: Tensor | None, gs: Sequence[Tensor], grad_x: Tensor | None, kept: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """As `LoraUpdate.add_backward`, dA of all in one product."""
        (inner,) = kept
        g_inner = torch.empty_like(inner)
        parts = g_inner.split(self._ranks, 1)
        for update, factor, part, g in zip(self._updates, self._factors, parts, gs, strict=True):
            part.copy_(g @ update.B.to(g.dtype)).mul_(factor)
        if grad_x is not None:
            grad_x.addmm_(g_inner, self._stacked_a(g_inner.dtype))
        if x is None:
            return (None,) * (2 * len(self._updates))
        grads: list[Tensor | None] = []
        grads_A = (g_inner.t() @ x).split(self._ranks)
        for update, factor, grad_A, part, g in zip(
            self._updates, self._factors, grads_A, inner.split(self._ranks, 1), gs, strict=True
        ):
            # Each in memory of its own: a view would keep the gradients of all.
            grads.append(grad_A.to(update.A.dtype, copy=True))
            grads.append((g.t() @ part).to(update.B.dtype).mul_(factor))
        return tuple(grads)

    def _stacked_a(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([update.A.to(dtype) for update in self._updates])
