"""A base model in memory: transformers' own model code, its decoder linears replaced by frozen, adaptable ones.

Source weights are memory-mapped and taken over one matrix at a time, so that loading needs little more than the frozen
model itself. Nothing of the source file is referred to afterwards.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgepeft.engine.model.checkpoint import open_checkpoint, take_weight
from edgepeft.engine.model.frozen import DTYPES, DenseWeight, FrozenWeight, Workspace, freeze
from edgepeft.engine.model.linear import AdaptedLinear
from edgepeft.errors import BadInput
from edgepeft.memory.breakdown import Category
from edgepeft.models.shape import ModelShape
from edgepeft.models.store import ModelEntry
from edgepeft.spec import ComputeDtype, Precision

Progress = Callable[[str, float | None], None]
"""Told what is being done and which share of it is done, if known."""

ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
"""Linears that choose experts: small, and their choice suffers from quantizing. They stay plain linears."""

_TRIM_ENTRIES = 1 << 24
"""Entries that are taken over between two times of giving freed memory back to the system."""


class LoadedModel:
    """A frozen base with its linears ready for adapters."""

    def __init__(
        self,
        model: PreTrainedModel,
        entry: ModelEntry,
        device: torch.device,
        compute_dtype: ComputeDtype,
        workspace: Workspace,
    ) -> None:
        self.model = model
        """transformers' causal language model; nothing in it requires a gradient."""
        self.entry = entry
        self.shape: ModelShape = entry.shape
        self.device = device
        self.compute_dtype: ComputeDtype = compute_dtype
        self.workspace = workspace
        self.decoder = inner_decoder(model)
        """The inner model; it returns hidden states after the final norm."""
        self.layers = decoder_layers(self.decoder)
        self._linears = {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}

    @property
    def head_weight(self) -> Tensor:
        """[vocab, hidden]; the embedding itself where they are tied."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    def linears(self) -> dict[str, AdaptedLinear]:
        """Every linear of the decoder layers by module path, in the model's order."""
        return dict(self._linears)

    def bytes_by_category(self) -> dict[Category, int]:
        """Live bytes of the base; the workspace counts with what it has grown to."""
        found: dict[Category, int] = {
            "frozen weights": 0,
            "quantization constants": 0,
            "embeddings and head": 0,
            "workspace": self.workspace.nbytes,
        }
        for linear in self._linears.values():
            for category, size in linear.weight_source.nbytes_by_category().items():
                found[category] += size
        tables = {id(self.head_weight), id(self.model.get_input_embeddings().weight)}
        for parameter in self.model.parameters():
            found["embeddings and head" if id(parameter) in tables else "frozen weights"] += parameter.nbytes
        found["frozen weights"] += sum(buffer.nbytes for buffer in self.model.buffers())
        return found


def load_model(
    entry: ModelEntry,
    *,
    precision: Precision,
    compute_dtype: ComputeDtype,
    device: torch.device,
    dense_values: bool = False,
    progress: Progress | None = None,
) -> LoadedModel:
    """Loads `entry` with its decoder linears in `precision` and everything else in the compute dtype.

    Args:
        entry: a model of the store.
        precision: how the linears of the decoder layers are held; experts and routers stay in the compute dtype.
        compute_dtype: dtype of products, embeddings, head and norms.
        device: where everything ends up.
        dense_values: quantize, then hold the dequantized values densely: the same numbers, more memory, and faster
            single-row products on the CPU.
        progress: told "loading …" with the share done.

    Raises:
        BadInput: a file is missing or damaged, a tensor is missing, or the architecture is not supported.
    """
    tell = progress or (lambda what, fraction: None)
    tell("opening the weights", None)
    dtype = DTYPES[compute_dtype]
    workspace = Workspace(device, dtype)
    model = open_checkpoint(entry, dtype)
    model.requires_grad_(False)
    layers = decoder_layers(inner_decoder(model))
    targets = list(_linears_of(model, layers))
    taken = 0
    for done, (parent, child, path) in enumerate(targets):
        tell(f"loading {entry.name}", done / len(targets))
        linear = getattr(parent, child)
        weight = _frozen(linear, precision, compute_dtype, device, workspace)
        if dense_values and not isinstance(weight, DenseWeight):
            dense = torch.empty(weight.shape, dtype=dtype, device=device)
            weight = DenseWeight(weight.materialize(dense), workspace)
        bias = None if linear.bias is None else linear.bias.detach().to(device, dtype, copy=True)
        setattr(parent, child, AdaptedLinear(weight, bias, path))
        taken += weight.shape[0] * weight.shape[1]
        if taken >= _TRIM_ENTRIES:
            _give_back_freed_memory()
            taken = 0
    if not targets:
        raise BadInput(
            f"{type(model).__name__} has no linear layers that adapters can be put on",
            where=entry.name,
            hint="Use another model",
        )
    _unpack_others(model, compute_dtype, device, workspace)
    _take_over_rest(model, device, dtype)
    model.eval()
    _give_back_freed_memory()
    tell(f"loading {entry.name}", 1.0)
    return LoadedModel(model, entry, device, compute_dtype, workspace)


def inner_decoder(model: PreTrainedModel) -> nn.Module:
    """The part of a causal language model that ends with the final norm."""
    decoder = model.get_decoder()
    if not isinstance(decoder, nn.Module) or decoder is model:
        raise BadInput(f"{type(model).__name__} has no decoder", hint="Use a decoder-only language model")
    return decoder


def decoder_layers(decoder: nn.Module) -> list[nn.Module]:
    """The decoder layers in order.

    Raises:
        BadInput: the module has no list of them.
    """
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child)]
    if not lists:
        raise BadInput(
            f"{type(decoder).__name__} has no list of decoder layers", hint="Use a decoder-only language model"
        )
    longest = max(lists, key=len)
    return list(longest)


def _linears_of(model: PreTrainedModel, layers: list[nn.Module]) -> list[tuple[nn.Module, str, str]]:
    """(parent, attribute, path) of each linear in the decoder layers."""
    inside = {id(module) for layer in layers for module in layer.modules()}
    return [
        (parent, child, f"{path}.{child}")
        for path, parent in model.named_modules()
        if id(parent) in inside
        for child, module in parent.named_children()
        if isinstance(module, nn.Linear) and child not in ROUTERS
    ]


def _frozen(
    linear: nn.Linear, precision: Precision, compute_dtype: ComputeDtype, device: torch.device, workspace: Workspace
) -> FrozenWeight:
    taken = take_weight(linear, precision, workspace)
    return freeze(taken, precision, compute_dtype, device, workspace) if isinstance(taken, Tensor) else taken


def _unpack_others(
    model: PreTrainedModel, compute_dtype: ComputeDtype, device: torch.device, workspace: Workspace
) -> None:
    """Quantized linears outside of the decoder layers (a head, a router) become plain ones in the compute dtype."""
    for parent in list(model.modules()):
        for child, module in list(parent.named_children()):
            if isinstance(module, nn.Linear) and not module.weight.is_floating_point():
                values = take_weight(module, compute_dtype, workspace)
                plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
                plain.weight = nn.Parameter(cast(Tensor, values), requires_grad=False)
                plain.bias = module.bias
                setattr(parent, child, plain)


def _take_over_rest(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Moves what is left into memory of its own; tied tensors are one parameter and stay tied."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.device.type != "meta":
            parameter.data = parameter.data.to(device, dtype, copy=True)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            # Rotary frequencies stay float32: in 16 bit far positions would fall together.
            module._buffers[name] = buffer.to(device)


def _give_back_freed_memory() -> None:
    """Has the C library return what is free in its heap: scratch lies between matrices that stay, so it cannot shrink.

    Without it a process that loaded in NF4 holds more than twice the model's bytes.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Any:
    """glibc's malloc_trim; None where the C library has none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
