"""A base model in memory: transformers' own model code, its decoder linears replaced by frozen, adaptable ones.

Source weights are memory-mapped and taken over one matrix at a time, so that loading needs little more than the frozen
model itself. Nothing of the source file is referred to afterwards. What is quantized is stored beside the model's entry
on the way; from then on the linears come from that copy, and those of the source are not read.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgepeft.engine.heap import trim_heap
from edgepeft.engine.kernels import to_device
from edgepeft.engine.ledger import assign, mark_place
from edgepeft.engine.model.checkpoint import open_checkpoint, take_weight
from edgepeft.engine.model.copy_reader import CopyReader, open_copy
from edgepeft.engine.model.copy_writer import CopyWriter, start_copy
from edgepeft.engine.model.entry import DecoderEntry
from edgepeft.engine.model.frozen import DTYPES, DenseWeight, FrozenWeight, Workspace, freeze
from edgepeft.engine.model.fused import fuse
from edgepeft.engine.model.linear import AdaptedLinear
from edgepeft.engine.model.prefix import PrefixSite
from edgepeft.engine.model.prompt import PromptSite
from edgepeft.engine.model.sites import AdaptedNorm, Branch, Site, find_branches, find_norms
from edgepeft.engine.model.tables import AdaptedTable, LowRank, find_tables
from edgepeft.errors import BadInput
from edgepeft.memory.breakdown import Category
from edgepeft.models.quantized_copy import CopyUnusableError
from edgepeft.models.shape import ModelShape
from edgepeft.models.store import ModelEntry
from edgepeft.spec import ComputeDtype, Precision

Progress = Callable[[str, float | None], None]
"""Told what is being done and which share of it is done, if known."""
Warn = Callable[[str], None]
"""Told what a person should know, as a clause."""

ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
"""Linears that choose experts: small, and their choice suffers from quantizing. They stay plain linears."""

_ANOTHER_MODEL = "Use another model"
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
        *,
        only_reads: bool = False,
    ) -> None:
        self.model = model
        """transformers' causal language model; nothing in it requires a gradient."""
        self.entry = entry
        self.shape: ModelShape = entry.shape
        self.device = device
        self.compute_dtype: ComputeDtype = compute_dtype
        self.workspace = workspace
        self.only_reads = only_reads
        """Whether adapters are read onto it and never trained, so that their tensors may stay in their files."""
        self.decoder = inner_decoder(model)
        """The inner model; it returns hidden states after the final norm."""
        self.layers = decoder_layers(self.decoder)
        self._linears = {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}
        self._branches = find_branches(model, self.layers)
        self._norms = find_norms(model, self.decoder)
        attentions = {name: branch.module for name, branch in self._branches.items() if branch.kind == "attention"}
        self._prefixes = {name: PrefixSite(module, name) for name, module in attentions.items()}
        self._tables = find_tables(model)
        self.prompt = PromptSite()
        """The place before the samples at the entry of the decoder."""
        embed = model.get_input_embeddings()
        self._entry = DecoderEntry(self.decoder, embed, self._prefixes, self.prompt, DTYPES[compute_dtype])

    @property
    def head_weight(self) -> Tensor | None:
        """The base's, [vocab, hidden], the embedding itself where they are tied; None where it is no single matrix."""
        weight = getattr(self.model.get_output_embeddings(), "weight", None)
        return weight if isinstance(weight, Tensor) and weight.dim() == 2 else None

    @property
    def is_tied(self) -> bool:
        """Whether embedding and head are one table."""
        return self.head_weight is self.model.get_input_embeddings().weight

    @property
    def head_in_force(self) -> Tensor | None:
        """The same, or what the active adapters put in its place, which is float32."""
        table = self._head_table()
        return self.head_weight if table is None else table.table()

    @property
    def added_to_head(self) -> tuple[LowRank, ...]:
        """What the active adapters add to that."""
        table = self._head_table()
        return () if table is None else table.added()

    def _head_table(self) -> AdaptedTable | None:
        return next((table for table in self._tables.values() if not table.reads_ids), None)

    def linears(self) -> dict[str, AdaptedLinear]:
        """Every linear of the decoder layers by module path, in the model's order."""
        return dict(self._linears)

    def branches(self) -> dict[str, Branch]:
        """Attention and MLP of every decoder layer by module path, in the model's order."""
        return dict(self._branches)

    def norms(self) -> dict[str, AdaptedNorm]:
        """Every norm of the decoder by module path, in the model's order."""
        return dict(self._norms)

    def prefixes(self) -> dict[str, PrefixSite]:
        """The place before the samples in the attention of every layer by module path, in the model's order."""
        return dict(self._prefixes)

    @property
    def leading_tokens(self) -> int:
        """Places of the context that active adapters take before every sample."""
        return self.prefix_tokens + self.prompt.tokens

    @property
    def prefix_tokens(self) -> int:
        """Those of them that hold no rows, but keys and values alone."""
        return self._entry.prefix_tokens

    def tables(self) -> dict[str, AdaptedTable]:
        """The embedding and the output head by module path."""
        return dict(self._tables)

    def sites(self) -> dict[str, Site]:
        """Everything that adapters can be put on, by its name: the path of a module, or one beside it."""
        prefixes = {site.name: site for site in self._prefixes.values()}
        return {
            **self._linears,
            **self._branches,
            **self._norms,
            **self._tables,
            **prefixes,
            self.prompt.name: self.prompt,
        }

    def forget_unfinished(self) -> None:
        """Drops what a forward that was left in the middle, such as by a lack of memory, has computed ahead."""
        for linear in self._linears.values():
            if linear.shares_input is not None:
                linear.shares_input.forget()

    def tensors_by_category(self) -> dict[Category, list[Tensor]]:
        """Every tensor of the base, without the workspace."""
        found: dict[Category, list[Tensor]] = {
            "frozen weights": [],
            "quantization constants": [],
            "embeddings and head": [],
        }
        for linear in self._linears.values():
            for category, tensors in linear.weight_source.tensors_by_category().items():
                found[category] += tensors
        tables = {id(self.head_weight), id(self.model.get_input_embeddings().weight)}
        for parameter in self.model.parameters():
            found["embeddings and head" if id(parameter) in tables else "frozen weights"].append(parameter)
        found["frozen weights"] += self.model.buffers()
        return found

    def bytes_by_category(self) -> dict[Category, int]:
        """Live bytes of the base; the workspace counts with what it has grown to."""
        found = {name: sum(tensor.nbytes for tensor in held) for name, held in self.tensors_by_category().items()}
        return found | {"workspace": self.workspace.nbytes}


def load_model(
    entry: ModelEntry,
    *,
    precision: Precision,
    compute_dtype: ComputeDtype,
    device: torch.device,
    dense_values: bool = False,
    progress: Progress | None = None,
    warn: Warn | None = None,
) -> LoadedModel:
    """Loads `entry` with its decoder linears in `precision` and everything else in the compute dtype.

    In nf4 and int8 the linears come from the stored copy, or are quantized and stored for the next load.

    Args:
        entry: a model of the store.
        precision: how the linears of the decoder layers are held; experts and routers stay in the compute dtype.
        compute_dtype: dtype of products, embeddings, head and norms.
        device: where everything ends up.
        dense_values: quantize, then hold the dequantized values densely: the same numbers, more memory, and faster
            single-row products on the CPU.
        progress: told "loading …", and whether it is storing, with the share done.
        warn: told why a stored copy is not used, or none is stored; without it `progress` is.

    Raises:
        BadInput: a file is missing or damaged, a tensor is missing, or the architecture is not supported.
    """
    tell = progress or (lambda what, fraction: None)
    say = warn or (lambda message: tell(message, None))

    def load(*, use_copy: bool) -> LoadedModel:
        return _load(
            entry, precision, compute_dtype, device, use_copy=use_copy, dense=dense_values, progress=tell, warn=say
        )

    try:
        return load(use_copy=True)
    except CopyUnusableError as error:
        why = str(error)
    # Outside of the handler: the error held on to what was loaded so far.
    gc.collect()
    say(f"the stored {precision} copy of {entry.name} is not used, it is quantized again: {why}")
    return load(use_copy=False)


def _load(
    entry: ModelEntry,
    precision: Precision,
    compute_dtype: ComputeDtype,
    device: torch.device,
    *,
    use_copy: bool,
    dense: bool,
    progress: Progress,
    warn: Warn,
) -> LoadedModel:
    """See `load_model`.

    Raises:
        CopyUnusableError: the stored copy must not be used.
    """
    progress("opening the weights", None)
    dtype = DTYPES[compute_dtype]
    workspace = Workspace(device, dtype)
    model, merged = open_checkpoint(entry, dtype)
    model.requires_grad_(False)
    linears = linears_of(model, decoder_layers(inner_decoder(model)))
    shapes = {path: _shape(getattr(parent, child)) for parent, child, path, _ in linears}
    with contextlib.ExitStack() as files:
        stored = open_copy(entry, precision, shapes, workspace) if use_copy else None
        storing = None if stored is not None else start_copy(entry, precision, shapes, workspace, warn)
        for copy in (stored, storing):
            if copy is not None:
                files.enter_context(copy)
        take_over(
            model,
            precision,
            compute_dtype,
            workspace,
            merged=merged,
            dense_values=dense,
            progress=progress,
            name=entry.name,
            stored=stored,
            storing=storing,
        )
        if storing is not None:
            progress(f"storing {precision} of {entry.name}", None)
            storing.finish()
    model.eval()
    trim_heap()
    progress(f"loading {entry.name}", 1.0)
    return LoadedModel(model, entry, device, compute_dtype, workspace)


def take_over(
    model: PreTrainedModel,
    precision: Precision,
    compute_dtype: ComputeDtype,
    workspace: Workspace,
    *,
    merged: Sequence[Tensor] = (),
    dense_values: bool = False,
    progress: Progress,
    name: str,
    stored: CopyReader | None = None,
    storing: CopyWriter | None = None,
) -> None:
    """Takes every weight of an opened model into memory of its own on the workspace's device; see `load_model`.

    Args:
        model: opened, its weights still those of its files.
        precision: of the decoder's linears.
        compute_dtype: of everything else.
        workspace: shared by all linears.
        merged: parameters that are in memory of their own already.
        dense_values: see `load_model`.
        progress: told how far it is.
        name: of the model, for `progress` and errors.
        stored: where the linears' quantized weights come from, instead of the model.
        storing: is given each quantized weight.

    Raises:
        BadInput: the model has no linears.
        CopyUnusableError: what is stored is damaged.
    """
    device, dtype = workspace.device, DTYPES[compute_dtype]
    layers = decoder_layers(inner_decoder(model))
    targets = linears_of(model, layers)
    what = f"loading {name}" if storing is None else f"loading {name}, storing {precision}"
    taken = 0
    for done, (parent, child, path, layer) in enumerate(targets):
        progress(what, done / len(targets))
        mark_place(f"loading layer {layer}")
        linear = getattr(parent, child)
        if stored is not None:
            weight = stored.read(path)
        else:
            weight = _frozen(linear, precision, compute_dtype, device, workspace)
        if storing is not None:
            storing.write(path, weight)
        if dense_values and not isinstance(weight, DenseWeight):
            dense = torch.empty(weight.shape, dtype=dtype, device=device)
            weight = DenseWeight(weight.materialize(dense), workspace)
        bias = None if linear.bias is None else linear.bias.detach().to(device, dtype, copy=True)
        setattr(parent, child, AdaptedLinear(weight, bias, path))
        for category, tensors in weight.tensors_by_category().items():
            assign(tensors, category)
        taken += weight.shape[0] * weight.shape[1]
        if taken >= _TRIM_ENTRIES:
            trim_heap()
            taken = 0
    if not targets:
        raise BadInput(
            f"{type(model).__name__} has no linear layers that adapters can be put on", where=name, hint=_ANOTHER_MODEL
        )
    mark_place("loading embeddings and head")
    unpack_others(model, compute_dtype, device, workspace)
    _take_over_rest(model, device, dtype, merged)
    fuse(model)


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


def linears_of(model: PreTrainedModel, layers: list[nn.Module]) -> list[tuple[nn.Module, str, str, int]]:
    """(parent, attribute, path, number of the layer from 1) of each linear in the decoder layers."""
    inside = {id(module): number for number, layer in enumerate(layers, 1) for module in layer.modules()}
    return [
        (parent, child, f"{path}.{child}", inside[id(parent)])
        for path, parent in model.named_modules()
        if id(parent) in inside
        for child, module in parent.named_children()
        if isinstance(module, nn.Linear) and child not in ROUTERS
    ]


def _shape(linear: nn.Linear) -> tuple[int, int]:
    return linear.out_features, linear.in_features


def _frozen(
    linear: nn.Linear, precision: Precision, compute_dtype: ComputeDtype, device: torch.device, workspace: Workspace
) -> FrozenWeight:
    taken = take_weight(linear, precision, workspace)
    return freeze(taken, precision, compute_dtype, device, workspace) if isinstance(taken, Tensor) else taken


def unpack_others(
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


def _take_over_rest(model: PreTrainedModel, device: torch.device, dtype: torch.dtype, merged: Sequence[Tensor]) -> None:
    """Moves what is left into memory of its own; tied tensors are one parameter and stay tied."""
    own = {id(parameter) for parameter in merged}
    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.device.type == "meta":
            continue
        if id(parameter) in own:
            parameter.data = to_device(parameter.data, device, dtype)
        else:
            parameter.data = parameter.data.to(device, dtype, copy=True)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            # Rotary frequencies stay float32: in 16 bit far positions would fall together.
            module._buffers[name] = buffer.to(device)
