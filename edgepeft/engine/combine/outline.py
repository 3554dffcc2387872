"""A base without its values: its modules and their shapes, for adapters to be read against; and what training saw."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from edgepeft.engine.combine.base_files import BaseFiles
from edgepeft.engine.model.checkpoint import DEQUANTIZED
from edgepeft.engine.model.copy_reader import CopyReader
from edgepeft.engine.model.frozen import DTYPES, DenseWeight, Workspace, freeze
from edgepeft.engine.model.linear import AdaptedLinear
from edgepeft.engine.model.load import LoadedModel, decoder_layers, inner_decoder, linears_of
from edgepeft.engine.simulate.model import build_model, read_config
from edgepeft.models.quantized_copy import (
    CopyUnusableError,
    DeviceKind,
    copy_path,
    copy_settings,
    read_copy_header,
)
from edgepeft.models.source_folder import read_json
from edgepeft.models.store import ModelEntry
from edgepeft.spec import ComputeDtype, Precision

CPU = torch.device("cpu")
_KINDS: tuple[DeviceKind, ...] = ("cuda", "cpu")
"""Whose stored copy is taken first: where there is a card, it is what trains."""


def open_outline(entry: ModelEntry) -> LoadedModel:
    """The base on torch's `meta` device, its decoder linears ready to hold adapters; no weight is read.

    Adapters that are read onto it are real and on the CPU.

    Raises:
        BadInput: its config cannot be used.
    """
    with torch.device("meta"):
        model = build_model(read_config(read_json(Path(entry.folder) / "config.json")))
        workspace = Workspace(torch.device("meta"), torch.float32)
        for parent, child, path, _ in linears_of(model, decoder_layers(inner_decoder(model))):
            linear = getattr(parent, child)
            setattr(parent, child, AdaptedLinear(DenseWeight(linear.weight, workspace), linear.bias, path))
    return LoadedModel(model, entry, CPU, "fp32", workspace, only_reads=True)


def shapes_of(outline: LoadedModel) -> dict[str, tuple[int, int]]:
    """[out, in] of each decoder linear by its path, in the model's order."""
    return {path: linear.weight_source.shape for path, linear in outline.linears().items()}


Values = Callable[[str], Tensor]
"""Gives the weight of the linear at a path."""


@contextlib.contextmanager
def trained_values(
    entry: ModelEntry,
    files: BaseFiles,
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, int]],
    precision: Precision,
    compute_dtype: ComputeDtype,
) -> Iterator[Values]:
    """What training in `precision` computed with: each linear's weight, quantized and dequantized, in `compute_dtype`.

    Quantized weights come from the copy that training stored beside the model. Without one they are quantized again,
    which on the CPU can differ from a card in values that lie midway between two codes.

    Args:
        entry: the base.
        files: its files.
        names: path of each decoder linear → name of its weight in the files.
        shapes: [out, in] of each decoder linear.
        precision: the base was held in.
        compute_dtype: products were computed in.
    """
    workspace = Workspace(CPU, DTYPES[compute_dtype])
    with contextlib.ExitStack() as opened:
        stored = _open_copy(entry, shapes, precision, workspace)
        if stored is not None:
            try:
                opened.enter_context(stored)
            except CopyUnusableError:
                stored = None

        def values(path: str) -> Tensor:
            weight = None
            if stored is not None:
                with contextlib.suppress(CopyUnusableError):
                    weight = stored.read(path)
            if weight is None:
                weight = files.packed(names[path], workspace) if _taken_over(entry, precision) else None
            if weight is None:
                source = files.read(names[path])
                if entry.stored_as in DEQUANTIZED:
                    # As transformers hands it to training.
                    source = source.to(DTYPES[compute_dtype])
                weight = freeze(source, precision, compute_dtype, CPU, workspace)
            return weight.materialize(torch.empty(weight.shape, dtype=DTYPES[compute_dtype]))

        yield values


def _taken_over(entry: ModelEntry, precision: Precision) -> bool:
    """Whether data that bitsandbytes packed serves the precision as it is."""
    return (entry.stored_as, precision) in (("bnb-4bit", "nf4"), ("bnb-8bit", "int8"))


def _open_copy(
    entry: ModelEntry, shapes: Mapping[str, tuple[int, int]], precision: Precision, workspace: Workspace
) -> CopyReader | None:
    for kind in _KINDS:
        settings = copy_settings(entry, precision, kind)
        if settings is None:
            return None
        path = copy_path(entry, settings)
        with contextlib.suppress(CopyUnusableError):
            header = read_copy_header(path, settings)
            if header is not None:
                return CopyReader(header, path, shapes, settings.precision, workspace)
    return None
