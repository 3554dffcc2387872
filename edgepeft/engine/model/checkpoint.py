"""Opening a base model's files: whatever they hold becomes a transformers model whose weights are still on disk.

Weights in 16 or 32 bit are memory-mapped. Bases that were quantized elsewhere: bitsandbytes 4-bit and 8-bit data is
taken over as it is; FP8 and MXFP4 are dequantized. Of a vision-language model only the language tower is kept.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import logging as transformers_logging

from edgepeft.engine.ledger import lie_in_files
from edgepeft.engine.model.frozen import (
    FrozenWeight,
    Int8Weight,
    Nf4Weight,
    Workspace,
    bitsandbytes_functional,
)
from edgepeft.errors import BadInput
from edgepeft.memory.chunks import ABSMAX_BLOCK
from edgepeft.models.headers import read_headers, weight_files
from edgepeft.models.store import ModelEntry
from edgepeft.spec import Precision

DEQUANTIZED = frozenset({"fp8", "mxfp4"})
"""Quantization methods of checkpoints that transformers turns back into 16 bit."""
TAKEN_OVER = frozenset({"bitsandbytes"})
"""Quantization methods of checkpoints whose data is used as it is."""


class OpenedModel(NamedTuple):
    """A model as it comes from its files."""

    model: PreTrainedModel
    """On the CPU, its weights memory-mapped where the files allow it."""
    merged: list[Tensor]
    """Parameters that were made of several tensors of the files, such as all experts of a layer: they are maps of no
    file."""


def open_checkpoint(entry: ModelEntry, dtype: torch.dtype) -> OpenedModel:
    """The causal language model of `entry`.

    `dtype` is what dequantized checkpoints are read into; others keep the dtype of their files.

    Raises:
        BadInput: files are missing or damaged, tensors are missing or misshaped, or the kind is not supported.
    """
    silence_transformers()
    where = entry.weights
    try:
        config = AutoConfig.from_pretrained(entry.folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise BadInput(f"its config cannot be used: {_first_line(error)}", where=entry.folder, hint=_ANEW) from error
    method = _prepare_quantization(config, where)
    vision = type(config) not in AutoModelForCausalLM._model_mapping
    auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    try:
        model, found = auto.from_pretrained(
            where,
            config=config,
            dtype=dtype if method in DEQUANTIZED else "auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            device_map={"": "cpu"} if method else None,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise BadInput(f"its weights cannot be read: {_first_line(error)}", where=where, hint=_ANEW) from error
    _check_complete(found, where)
    drop_other_towers(model)
    merged: list[Tensor] = []
    if method is None:
        stored = {header.shape for header in read_headers(weight_files(Path(where))).values()}
        merged = [parameter for parameter in model.parameters() if tuple(parameter.shape) not in stored]
    if method not in DEQUANTIZED:
        lie_in_files([parameter for parameter in model.parameters() if not any(parameter is own for own in merged)])
    return OpenedModel(model, merged)


def take_weight(linear: Any, precision: Precision, workspace: Workspace) -> FrozenWeight | Tensor:
    """The weight of a freshly opened linear: frozen where packed data serves `precision` as it is, else its values."""
    weight: Any = linear.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        four_bit = four_bit_weight(weight.data, state, workspace)
        return four_bit if precision == "nf4" else dense_values(four_bit)
    if weight.dtype == torch.int8:
        scales = weight.SCB if getattr(weight, "SCB", None) is not None else linear.state.SCB
        codes = weight.data.to(workspace.device, copy=True)
        eight_bit = Int8Weight(codes, scales.to(workspace.device, torch.float32, copy=True).reshape(-1), workspace)
        return eight_bit if precision == "int8" else dense_values(eight_bit)
    values: Tensor = weight
    return values


def dense_values(weight: FrozenWeight) -> Tensor:
    """Its values in float32, in memory of their own."""
    return weight.materialize(torch.empty(weight.shape, dtype=torch.float32, device=weight.device))


def four_bit_weight(data: Tensor, state: Any, workspace: Workspace) -> Nf4Weight:
    """bitsandbytes' own packed data and QuantState, moved into memory of our own."""

    def own(tensor: Tensor) -> Tensor:
        return tensor.to(workspace.device, copy=True)

    if state.quant_type != "nf4":
        raise BadInput(f"its 4-bit data is of type {state.quant_type}; only NF4 can be used", hint=_SIXTEEN_BIT)
    nested = None
    if state.nested:
        nested = (own(state.state2.absmax), own(state.state2.code), own(state.offset))
    return Nf4Weight(
        own(data.view(torch.uint8)),
        own(state.absmax),
        nested,
        (int(state.shape[0]), int(state.shape[1])),
        workspace,
        block=state.blocksize,
        nested_block=state.state2.blocksize if state.nested else ABSMAX_BLOCK,
    )


def _prepare_quantization(config: Any, where: str) -> str | None:
    """The checkpoint's quantization method, with the config changed so that transformers dequantizes where it can.

    Raises:
        BadInput: the method is not supported.
    """
    settings: dict[str, Any] | None = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = str(settings.get("quant_method", "bitsandbytes"))
    if method in DEQUANTIZED:
        settings["dequantize"] = True
    elif method in TAKEN_OVER:
        bitsandbytes_functional()
    else:
        raise BadInput(
            f"its weights are quantized by {method}, which cannot be trained on here",
            where=where,
            hint=_SIXTEEN_BIT,
        )
    return method


def _check_complete(found: Any, where: str) -> None:
    missing, misshaped = sorted(found["missing_keys"]), sorted(map(str, found["mismatched_keys"]))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BadInput(f"tensor {missing[0]}{more} is in none of its files", where=where, hint=_ANEW)
    if misshaped:
        raise BadInput(f"a tensor has another shape than config.json says: {misshaped[0]}", where=where, hint=_ANEW)


def drop_other_towers(model: PreTrainedModel) -> None:
    """Keeps decoder and head alone; the forward of vision-language models skips what is None without an image."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    kept = {id(module) for root in (decoder, head) if root is not None for module in root.modules()}

    def prune(parent: nn.Module) -> None:
        for name, child in list(parent.named_children()):
            if id(child) in kept:
                continue
            if any(id(module) in kept for module in child.modules()):
                prune(child)
            else:
                setattr(parent, name, None)

    if type(model.config) is not type(decoder.config):
        prune(model)


@functools.cache
def silence_transformers() -> None:
    """No progress bars and no remarks: a worker's output belongs to its protocol, and errors are raised."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


_ANEW = "Take the model's files anew from where they came from"
_SIXTEEN_BIT = "Use the 16-bit version of the model; edgepeft quantizes it itself"
