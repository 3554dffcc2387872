"""The closed form: what a training run needs, by category and phase, from shapes alone.

The micro-batch goes over a tape that follows the engine's operations one by one (`memory.tape`); what outlives it is
added. It takes a fraction of a millisecond. The same categories appear in the dry run and in measured events.
"""

from __future__ import annotations

from edgepeft.memory.assembly import INT64, Pass, is_exact, plan_micro_batch
from edgepeft.memory.breakdown import Breakdown, Category, Phase, PhaseName
from edgepeft.memory.chunks import CPU_CHUNK, NF4_BLOCK, QUANTIZING_BYTES
from edgepeft.memory.micro_batch import MicroBatchPlan, Place, evaluate, train
from edgepeft.memory.operations import FLOAT32
from edgepeft.memory.optimizer import state_bytes
from edgepeft.memory.slack import slack_bytes
from edgepeft.memory.tape import CATEGORIES
from edgepeft.memory.target import DeviceKind, Target
from edgepeft.memory.unseen import unseen
from edgepeft.memory.weights import ELEMENT_BYTES, base_bytes
from edgepeft.memory.workload import Workload
from edgepeft.methods import method_of
from edgepeft.models.shape import ModelShape
from edgepeft.spec import ComputeDtype, Precision, RunSpec

Ledger = dict[Category, int]

UNCERTAINTY: dict[DeviceKind, float] = {"cpu": 0.03, "cuda": 0.08}
"""Share by which a measured peak may lie above the closed form: checked on the CPU, assumed on CUDA."""
UNCERTAINTY_OF_UNKNOWN = 0.15
"""The same, more, for an architecture that is taken for Llama."""
SOURCE_BYTES = 2
"""Of an entry in a model's files."""
NF4_MAP_BYTES = 256 * FLOAT32
"""The 8-bit dynamic type's values, which all matrices share."""


def estimate_training(spec: RunSpec, shape: ModelShape, workload: Workload, target: Target) -> Breakdown:
    """Predicts the memory of every phase of a training run.

    Args:
        spec: the run.
        shape: its base.
        workload: the micro-batches at its highest points.
        target: the device.

    Raises:
        UsageError: the method's targets or rank do not suit the model.
    """
    recipe, layout = spec.recipe, spec.layout
    base = base_bytes(shape, recipe.precision, recipe.compute_dtype)
    method = method_of(recipe.method)
    tensors = method.trained(recipe.method, shape)
    trained = FLOAT32 * tensors.parameters(shape.layers)

    def planned(lengths: tuple[int, ...], rows: int, *, training: bool) -> MicroBatchPlan:
        given = Pass(
            recipe.precision, recipe.compute_dtype, target, lengths, rows, layout.loss_chunk_tokens, training=training
        )
        return plan_micro_batch(shape, given, recipe.method)

    batch = planned(workload.row_lengths(), workload.trained, training=True)
    resident = _sum(
        base,
        {
            "adapter weights": trained + method.held_bytes(recipe.method, shape),
            "optimizer state": state_bytes(recipe.optimizer.name, tensors.sizes(shape.layers)),
            # Copies that take the base's place are float32, whatever that is held in.
            "workspace": max(
                workspace_bytes(shape, "fp32" if method.needs_dense_base else recipe.precision, recipe.compute_dtype),
                _formed_bytes(spec, shape),
            ),
        },
    )
    step = train(
        batch,
        checkpointed=layout.checkpointing != "none",
        alone=workload.alone,
        offloaded=layout.checkpointing == "offload" and target.kind == "cuda",
    )
    before: Ledger = {"gradients": 0 if workload.alone else trained}
    phases: list[tuple[PhaseName, Ledger, str]] = [
        ("load", *_load(shape, recipe.precision, recipe.compute_dtype, base, target)),
        ("train step", _sum(resident, _given(batch), before, _ledger(step)), step.name),
    ]
    if held_out := workload.held_out_row_lengths():
        batch = planned(held_out, workload.held_out_trained, training=False)
        forward = evaluate(batch)
        phases.append(("evaluation", _sum(resident, _given(batch), _ledger(forward)), forward.name))
    else:
        phases.append(("evaluation", resident, ""))
    # The bytes of the adapter's file exist whole before they are written.
    kept = trained + method.saving_bytes(recipe.method, shape)
    phases.append(("save", _sum(resident, {"adapter weights": kept}), "save"))
    return Breakdown(
        _on_device(phases, target), UNCERTAINTY[target.kind] + (0.0 if is_exact(shape) else UNCERTAINTY_OF_UNKNOWN)
    )


def workspace_bytes(shape: ModelShape, precision: Precision, compute_dtype: ComputeDtype) -> int:
    """The buffer into which one matrix at a time is dequantized, and what all matrices share; 0 where none is."""
    if precision == compute_dtype:
        return 0
    largest = max(linear.in_features * linear.out_features for linear in shape.linears)
    return ELEMENT_BYTES[compute_dtype] * largest + (NF4_MAP_BYTES if precision == "nf4" else 0)


def _formed_bytes(spec: RunSpec, shape: ModelShape) -> int:
    """The buffer for matrices that the method changes; 0 where it changes none."""
    config, method = spec.recipe.method, method_of(spec.recipe.method)
    if not method.forms_matrices(config):
        return 0
    largest = max(linear.in_features * linear.out_features for linear in method.targeted(config, shape))
    return ELEMENT_BYTES[spec.recipe.compute_dtype] * largest


def _given(batch: MicroBatchPlan) -> Ledger:
    """What a micro-batch is made of: ids and positions, trained rows and targets."""
    return {"workspace": INT64 * 2 * (batch.tokens + batch.loss.trained)}


def _load(
    shape: ModelShape, precision: Precision, compute_dtype: ComputeDtype, base: Ledger, target: Target
) -> tuple[Ledger, str]:
    """While weights are read: all of the base, or its linears and what taking over one of them needs.

    That of a first load, which quantizes. Later ones read what it stored (`models.quantized_copy`) straight into the
    memory that keeps it and need less: no scratch at all on the device.
    """
    largest = max(shape.linears, key=lambda linear: linear.in_features * linear.out_features)
    entries = largest.in_features * largest.out_features
    scratch = 0
    if precision == "nf4":
        # Scales in float32, once as they are and once less their mean; on a card the matrix itself.
        scratch = 2 * FLOAT32 * (entries // NF4_BLOCK)
        if target.kind == "cuda":
            scratch += SOURCE_BYTES * entries
        else:
            # A chunk's codes and scales, and what making them takes, beside the scales of all.
            chunk = min(entries, CPU_CHUNK)
            making = round((0.5 + FLOAT32 / NF4_BLOCK + QUANTIZING_BYTES[SOURCE_BYTES]) * chunk)
            scratch = max(scratch, FLOAT32 * (entries // NF4_BLOCK) + making)
    elif precision == "int8":
        # A chunk in float32, scaled and in whole numbers.
        scratch = (2 * FLOAT32 + 1) * min(entries, CPU_CHUNK)
    if scratch <= base["embeddings and head"]:
        return base, "loading embeddings and head"
    linears: Ledger = {category: size for category, size in base.items() if category != "embeddings and head"}
    return _sum(linears, {"workspace": scratch}), f"loading layer {shape.layers}"


def on_device(ledger: Ledger, target: Target) -> Ledger:
    """The ledger with what a CUDA device holds beside tensors, in whole bytes and without empty rows.

    A phase is told from its own needs: what the allocator still caches of the phase before, it can use again.

    Args:
        ledger: live tensor bytes of a phase.
        target: the device; the CPU adds nothing.
    """
    added: Ledger = {}
    if target.kind == "cuda":
        added["allocator slack"] = slack_bytes(ledger, target.expandable_segments)
        for row in unseen(target):
            added[row.category] = added.get(row.category, 0) + row.size_bytes
    return {category: size for category, size in _sum(ledger, added).items() if size}


def _on_device(phases: list[tuple[PhaseName, Ledger, str]], target: Target) -> tuple[Phase, ...]:
    found: list[Phase] = []
    for name, ledger, place in phases:
        held = on_device(ledger, target)
        total = sum(held.values()) if target.kind == "cuda" else None
        found.append(Phase(name, held, place, reserved_bytes=total))
    return tuple(found)


def _ledger(place: Place) -> Ledger:
    return dict(zip(CATEGORIES, place.by_category, strict=True))


def _sum(*ledgers: Ledger) -> Ledger:
    total: Ledger = {}
    for ledger in ledgers:
        for category, size in ledger.items():
            total[category] = total.get(category, 0) + size
    return total
