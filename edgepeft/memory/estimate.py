"""The closed form: what a training run needs, by category and phase, from shapes alone.

It follows the modules that the engine runs and takes a fraction of a millisecond. The same categories appear in
measured events.
"""

from __future__ import annotations

from typing import Literal

from edgepeft.memory.activations import FLOAT32, layer_activations
from edgepeft.memory.breakdown import Breakdown, Category, Phase, PhaseName
from edgepeft.memory.weights import ELEMENT_BYTES, NF4_BLOCK, base_bytes
from edgepeft.methods import method_of
from edgepeft.models.shape import ModelShape
from edgepeft.spec import ComputeDtype, Precision, RunSpec
from edgepeft.units import MIB

DeviceKind = Literal["cpu", "cuda"]
Ledger = dict[Category, int]

CUDA_CONTEXT_BYTES = 450 * MIB
"""What a process holds on a card before its first tensor: context, kernels' code, a cuBLAS workspace. An assumption,
not measured by this project: drivers and architectures range from about 300 to 600 MiB."""
CUDA_SLACK_SHARE = 0.06
"""Freed but not reusable memory in the caching allocator, as a share of what changes during a step; an assumption for
expandable segments, under which the allocator keeps no fixed-size segments."""
CUDA_SLACK_BYTES = 64 * MIB
"""The allocator's segments for small tensors and its rounding; an assumption as above."""
UNCERTAINTY: dict[DeviceKind, float] = {"cpu": 0.05, "cuda": 0.10}
"""Share by which a measured peak may lie above the closed form: checked on the CPU, assumed on CUDA."""
LOSS_SCRATCH_BYTES: dict[DeviceKind, int] = {"cpu": 4 * MIB, "cuda": 64 * MIB}
"""Float32 scratch of the cross-entropy."""
QUANTIZE_CHUNK_ENTRIES = 1 << 20
QUANTIZE_BYTES_PER_ENTRY = 14
"""Transient bytes of an entry while it is quantized to 4 bit; the CPU does it a chunk at a time."""


def estimate_training(
    spec: RunSpec,
    shape: ModelShape,
    *,
    longest_sample: int,
    device_kind: DeviceKind,
    step_tokens: int | None = None,
) -> Breakdown:
    """Predicts the memory of every phase of a training run.

    Args:
        spec: the run.
        shape: its base.
        longest_sample: tokens of the longest sample after truncation; a single one may exceed the micro-batch's cap.
        device_kind: on `cpu` the ledger is live tensor bytes, on `cuda` what the card has to hold.
        step_tokens: tokens of the largest optimizer step, when known; no micro-batch holds more.

    Raises:
        UsageError: the method's targets or rank do not suit the model.
    """
    recipe, layout = spec.recipe, spec.layout
    method = method_of(recipe.method)
    compute_bytes = ELEMENT_BYTES[recipe.compute_dtype]
    cap = layout.micro_batch_tokens if step_tokens is None else min(layout.micro_batch_tokens, step_tokens)
    tokens = max(cap, longest_sample)
    layer = layer_activations(
        shape,
        recipe.method,
        compute_bytes,
        tokens=tokens,
        longest_sample=longest_sample,
        on_cpu=device_kind == "cpu",
    )
    base = base_bytes(shape, recipe.precision, recipe.compute_dtype)
    adapter_bytes = FLOAT32 * method.count_parameters(recipe.method, shape)
    workspace = workspace_bytes(shape, recipe.precision, recipe.compute_dtype)
    resident = _sum(
        base,
        {
            "adapter weights": adapter_bytes,
            "optimizer state": 2 * adapter_bytes,
            "workspace": workspace + method.workspace_bytes(recipe.method, shape, compute_bytes),
        },
    )
    residual = compute_bytes * shape.hidden * tokens
    # Ids, positions, trained rows and targets are int64; sine and cosine serve all layers.
    shared = tokens * (4 * 8 + 2 * compute_bytes * shape.head_dim)
    if layout.checkpointing == "layer":
        saved_of_layer, recomputed = residual, layer.saved + layer.backward
    else:
        saved_of_layer, recomputed = layer.saved, max(0, layer.backward)
    saved, gradients = shape.layers * saved_of_layer, adapter_bytes
    if step_tokens is not None and step_tokens <= layout.micro_batch_tokens:
        # With one micro-batch a step, gradients come into being layer by layer while saved activations go: the peak is
        # at one end or the other.
        one_layer = adapter_bytes // shape.layers
        saved, gradients = max((saved, one_layer), (saved_of_layer, adapter_bytes), key=sum)
    train_loss, held_out_loss = (
        loss_bytes(shape, recipe.compute_dtype, device_kind, tokens, layout.loss_chunk_tokens, with_gradient=gradient)
        for gradient in (True, False)
    )
    phases: dict[PhaseName, Ledger] = {
        "load": _sum(base, {"workspace": load_bytes(shape, recipe.precision, recipe.compute_dtype, device_kind)}),
        "train step": _sum(
            resident,
            {"gradients": gradients, "saved activations": shared + saved + 2 * residual},
            _larger(recomputed, train_loss),
        ),
        "evaluation": _sum(resident, {"saved activations": shared + residual}, _larger(layer.forward, held_out_loss)),
        "save": _sum(resident, {"adapter weights": adapter_bytes}),
    }
    return Breakdown(
        tuple(Phase(name, on_device(ledger, base, device_kind)) for name, ledger in phases.items()),
        UNCERTAINTY[device_kind],
    )


def workspace_bytes(shape: ModelShape, precision: Precision, compute_dtype: ComputeDtype) -> int:
    """The buffer into which one matrix at a time is dequantized, and the scales beside it; 0 where none is needed."""
    largest = max(linear.in_features * linear.out_features for linear in shape.linears)
    if precision == compute_dtype:
        return 0
    scales = FLOAT32 * (largest // NF4_BLOCK) if precision == "nf4" else 0
    return ELEMENT_BYTES[compute_dtype] * largest + scales


def loss_bytes(
    shape: ModelShape,
    compute_dtype: ComputeDtype,
    device_kind: DeviceKind,
    tokens: int,
    chunk_tokens: int,
    *,
    with_gradient: bool,
) -> int:
    """The chunked cross-entropy: one buffer of logits, float32 scratch, and the gradient of the hidden states."""
    c = ELEMENT_BYTES[compute_dtype]
    chunk = min(chunk_tokens, tokens)
    scratch = max(FLOAT32 * shape.vocab, min(LOSS_SCRATCH_BYTES[device_kind], FLOAT32 * shape.vocab * chunk))
    gradient = c * shape.hidden * tokens if with_gradient else 0
    return c * chunk * (shape.vocab + shape.hidden) + scratch + gradient


def load_bytes(shape: ModelShape, precision: Precision, compute_dtype: ComputeDtype, device_kind: DeviceKind) -> int:
    """Transient bytes while weights are read: one source tensor, and what quantizing it needs."""
    largest = max(linear.in_features * linear.out_features for linear in shape.linears)
    source = ELEMENT_BYTES[compute_dtype] * max(largest, shape.vocab * shape.hidden)
    if precision != "nf4":
        return source
    entries = min(largest, QUANTIZE_CHUNK_ENTRIES) if device_kind == "cpu" else largest
    return source + QUANTIZE_BYTES_PER_ENTRY * entries


def on_device(ledger: Ledger, base: Ledger, device_kind: DeviceKind) -> Ledger:
    """The ledger with what a CUDA device holds beside tensors, in whole bytes and without empty rows.

    Args:
        ledger: live tensor bytes of a phase.
        base: the part of it that is allocated once and leaves no gaps.
        device_kind: `cpu` adds nothing.
    """
    added: Ledger = {}
    if device_kind == "cuda":
        changing = sum(ledger.values()) - sum(base.values())
        added = {
            "device context": CUDA_CONTEXT_BYTES,
            "allocator slack": CUDA_SLACK_BYTES + round(CUDA_SLACK_SHARE * changing),
        }
    return {category: size for category, size in _sum(ledger, added).items() if size}


def _larger(recomputed: int, loss: int) -> Ledger:
    """The loss is done before the first layer runs backward, so only one of the two is at the peak."""
    return {"recomputed layer": recomputed} if recomputed >= loss else {"logits and loss": loss}


def _sum(*ledgers: Ledger) -> Ledger:
    total: Ledger = {}
    for ledger in ledgers:
        for category, size in ledger.items():
            total[category] = total.get(category, 0) + size
    return total
