"""A model that runs with one weight matrix in memory at a time, in float32: for comparing models of any size on a CPU.

Decoder linears read their weight for each product; norms and experts become float32 while their layer runs; embedding
and head stay in their files, the head's product going by parts of the vocabulary. All prompts run at once, so that each
weight is read once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgepeft.engine.combine.outline import CPU, Values
from edgepeft.engine.heap import trim_heap
from edgepeft.engine.model.checkpoint import open_checkpoint
from edgepeft.engine.model.frozen import Workspace
from edgepeft.engine.model.linear import AdaptedLinear
from edgepeft.engine.model.load import LoadedModel, decoder_layers, inner_decoder, linears_of, unpack_others
from edgepeft.memory.breakdown import Category
from edgepeft.models.store import ModelEntry

_HEAD_ROWS = 4096


class StreamedWeight:
    """A frozen matrix that is read for each product and let go of after it."""

    def __init__(self, shape: tuple[int, int], values: Callable[[], Tensor]) -> None:
        self.shape = shape
        self.device = CPU
        self._values = values

    def matmul(self, x: Tensor) -> Tensor:
        """`x @ W.T`."""
        return F.linear(x, self._values().to(x.dtype))

    def matmul_transposed(self, g: Tensor) -> Tensor:
        """`g @ W`."""
        return torch.matmul(g, self._values().to(g.dtype))

    def add_matmul_transposed(self, g: Tensor, out: Tensor) -> None:
        """`out += g @ W`."""
        out.addmm_(g, self._values().to(g.dtype))

    def materialize(self, out: Tensor) -> Tensor:
        """Writes the values into `out`."""
        out.copy_(self._values())
        # Whoever asks for one matrix after the other would leave holes that the next does not fit into.
        trim_heap()
        return out

    def prefetch(self) -> None:
        """Nothing: it is read when it is needed."""

    def tensors_by_category(self) -> dict[Category, list[Tensor]]:
        """Nothing is held."""
        return {}


def open_streamed(entry: ModelEntry, values: Values | None = None) -> LoadedModel:
    """The model of `entry` for forward passes in float32; adapters can be put on it.

    Args:
        entry: of the store, or one that points to another folder.
        values: gives the weight of the linear at a path; None for those in the files.

    Raises:
        BadInput: its files are missing, damaged or not supported.
    """
    model = open_checkpoint(entry, torch.bfloat16).model
    model.requires_grad_(False)
    layers = decoder_layers(inner_decoder(model))
    for parent, child, path, _ in linears_of(model, layers):
        linear = getattr(parent, child)
        shape = (linear.out_features, linear.in_features)
        read = (lambda weight=linear.weight: weight.detach()) if values is None else partial(values, path)
        setattr(parent, child, AdaptedLinear(StreamedWeight(shape, read), linear.bias, path))
    workspace = Workspace(CPU, torch.float32)
    unpack_others(model, "fp32", CPU, workspace)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding.register_forward_hook(lambda module, inputs, output: output.float())
    left_alone = {id(embedding.weight)}
    if isinstance(head, nn.Linear):
        left_alone |= {id(parameter) for parameter in head.parameters()}
        head.__dict__["forward"] = partial(_head_product, head)
    for layer in layers:
        left_alone |= {id(parameter) for parameter in layer.parameters()}
        _widen_while_running(layer)
    for parameter in model.parameters():
        if id(parameter) not in left_alone and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    model.eval()
    return LoadedModel(model, entry, CPU, "fp32", workspace, only_reads=True)


@torch.no_grad()
def logits_of(loaded: LoadedModel, ids: Tensor) -> Tensor:
    """Logits [B, T, V], float32, for ids [B, T]; rows are padded on their right, where causal attention never looks."""
    logits: Tensor = loaded.model(input_ids=ids, use_cache=False).logits
    return logits.float()


def _widen_while_running(layer: nn.Module) -> None:
    """Parameters of a layer, beside the weights that are streamed, are float32 during its forward only."""
    narrow: list[tuple[nn.Parameter, Tensor]] = []

    def widen(*_: Any) -> None:
        for parameter in layer.parameters():
            if parameter.is_floating_point() and parameter.dtype != torch.float32:
                narrow.append((parameter, parameter.data))
                parameter.data = parameter.data.float()

    def restore(*_: Any) -> None:
        while narrow:
            parameter, data = narrow.pop()
            parameter.data = data

    layer.register_forward_pre_hook(widen)
    layer.register_forward_hook(restore, always_call=True)


def _head_product(head: nn.Linear, x: Tensor) -> Tensor:
    out = x.new_empty((*x.shape[:-1], head.out_features))
    for start in range(0, head.out_features, _HEAD_ROWS):
        rows = slice(start, start + _HEAD_ROWS)
        out[..., rows] = F.linear(x, head.weight[rows].to(x.dtype))
    return out if head.bias is None else out.add_(head.bias.to(x.dtype))
