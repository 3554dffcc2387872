"""How far a merged model's predictions are from those of the adapter on its base.

The base is held as in training, and both models compute in float32: what is told is the change of the weights, without
the noise of 16-bit products.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from edgepeft.engine.combine.base_files import BaseFiles, locate
from edgepeft.engine.combine.outline import open_outline, shapes_of, trained_values
from edgepeft.engine.combine.streamed import logits_of, open_streamed
from edgepeft.engine.heap import trim_heap
from edgepeft.engine.methods import set_active
from edgepeft.engine.methods.files import read_adapter
from edgepeft.errors import BadInput
from edgepeft.library.merging import Drift
from edgepeft.models.store import ModelEntry
from edgepeft.processes import Progress
from edgepeft.spec import ComputeDtype, Precision

_LOGITS_BYTES = 1 << 27
"""Logits of one model at the most; prompts beyond it are cut or left out."""
_SHORTEST = 32
"""Tokens that prompts are not cut below."""
_ROWS = 16


def batch_prompts(prompts: Sequence[Sequence[int]], vocab: int) -> tuple[Tensor, Tensor]:
    """Prompts as ids [B, T] and which of them are no padding; as many tokens as logits of 128 MiB allow.

    Raises:
        BadInput: there are none.
    """
    most = max(1, _LOGITS_BYTES // (4 * vocab))
    usable = [prompt for prompt in prompts if prompt]
    if not usable:
        raise BadInput("there is no prompt to compare the models on", where="--prompts", hint="Give a file with text")
    width = min(max(map(len, usable)), max(_SHORTEST, most // len(usable)), most)
    kept = [prompt[:width] for prompt in usable[: most // width]]
    ids = torch.zeros(len(kept), max(map(len, kept)), dtype=torch.int64)
    real = torch.zeros_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(kept):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        real[row, : len(prompt)] = True
    return ids, real


def measure_drift(
    entry: ModelEntry,
    adapter: Path,
    merged: Path,
    prompts: Sequence[Sequence[int]],
    precision: Precision,
    compute_dtype: ComputeDtype,
    progress: Progress,
) -> Drift:
    """Compares the next-token distributions of the adapter on its base and of the merged model at each token.

    Args:
        entry: the base.
        adapter: folder of the adapter.
        merged: folder of the merged model: config.json and safetensors.
        prompts: token ids of each.
        precision: the base is held in, as in training.
        compute_dtype: that training computed in.
        progress: told how far it is.

    Raises:
        BadInput: a model cannot be opened, or its logits are not finite.
    """
    ids, real = batch_prompts(prompts, entry.shape.vocab)
    reference = _reference_logits(entry, adapter, ids, precision, compute_dtype, progress)
    trim_heap()
    other = msgspec.structs.replace(entry, folder=str(merged), weights=str(merged), stored_as="bf16")
    loaded = open_streamed(other)
    _tell_layers(loaded.layers, progress, 0.5)
    found = logits_of(loaded, ids)
    if found.shape != reference.shape:
        raise BadInput(f"its logits have the shape {tuple(found.shape)}, the base's {tuple(reference.shape)}")
    return compare_logits(reference, found, real)


def compare_logits(reference: Tensor, found: Tensor, real: Tensor) -> Drift:
    """Kullback-Leibler divergence in nats of `found` from `reference`, both [B, T, V], and greedy agreement.

    Args:
        reference: logits.
        found: logits.
        real: [B, T], the positions that count.

    Raises:
        BadInput: a logit is not finite.
    """
    total = largest = 0.0
    agreed = 0
    for places in real.nonzero().split(_ROWS):
        rows = tuple(places.t())
        p = torch.log_softmax(reference[rows].double(), dim=-1)
        q = torch.log_softmax(found[rows].double(), dim=-1)
        divergence = (p.exp() * (p - q)).sum(-1).clamp_(min=0)
        total += float(divergence.sum())
        largest = max(largest, float(divergence.max()))
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
    if not math.isfinite(total):
        raise BadInput("the merged model's logits are not finite", hint="Write safetensors with --dtype bf16 or fp32")
    tokens = int(real.sum())
    return Drift(
        prompts=len(real), tokens=tokens, mean_kl=total / tokens, max_kl=largest, top1_agreement=agreed / tokens
    )


def _reference_logits(
    entry: ModelEntry,
    adapter: Path,
    ids: Tensor,
    precision: Precision,
    compute_dtype: ComputeDtype,
    progress: Progress,
) -> Tensor:
    files, shapes = BaseFiles(entry), shapes_of(open_outline(entry))
    names = locate(shapes, files.tensors, entry.weights)
    with contextlib.ExitStack() as opened:
        values = opened.enter_context(trained_values(entry, files, names, shapes, precision, compute_dtype))
        loaded = open_streamed(entry, values)
        read_adapter(adapter, loaded, "adapter")
        set_active(loaded, [("adapter", 1.0)])
        _tell_layers(loaded.layers, progress, 0.0)
        return logits_of(loaded, ids)


def _tell_layers(layers: Sequence[torch.nn.Module], progress: Progress, done: float) -> None:
    for number, layer in enumerate(layers):
        share = done + 0.5 * number / len(layers)
        layer.register_forward_pre_hook(
            lambda *_, share=share: progress("comparing with the adapter on its base", share)
        )
