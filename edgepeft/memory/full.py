"""What training every weight of a model would take, for models so small that it fits easily.

Weights, gradients and AdamW's two moments are float32; every decoder layer keeps its input and is recomputed.
"""

from __future__ import annotations

from edgepeft.memory.assembly import Pass, plan_with
from edgepeft.memory.estimate import Ledger, on_device
from edgepeft.memory.micro_batch import train
from edgepeft.memory.operations import FLOAT32
from edgepeft.memory.tape import CATEGORIES
from edgepeft.memory.target import Target
from edgepeft.memory.weights import ELEMENT_BYTES
from edgepeft.memory.workload import Workload
from edgepeft.methods import LinearTerms
from edgepeft.models.shape import LinearShape, ModelShape
from edgepeft.spec import ComputeDtype


def full_finetuning_bytes(
    shape: ModelShape,
    compute_dtype: ComputeDtype,
    workload: Workload,
    target: Target,
    *,
    loss_chunk_tokens: int = 256,
) -> int:
    """The peak of a train step that changes every weight.

    Args:
        shape: the model.
        compute_dtype: of products; weights are float32 beside it.
        workload: the micro-batch that decides the peak.
        target: the device.
        loss_chunk_tokens: rows of hidden states whose logits exist at one time.
    """
    given = Pass(
        "fp32", compute_dtype, target, workload.row_lengths(), workload.trained, loss_chunk_tokens, training=True
    )
    # A weight in another dtype is copied for its products.
    copy = 0 if compute_dtype == "fp32" else ELEMENT_BYTES[compute_dtype]

    def update_of(linear: LinearShape) -> LinearTerms:
        entries = linear.parameters
        return LinearTerms(parameters=entries, forward_bytes=copy * entries, backward_bytes=(copy + FLOAT32) * entries)

    step = train(plan_with(shape, given, update_of), checkpointed=True, alone=False)
    states = 4 * FLOAT32 * shape.parameters
    ledger: Ledger = {"frozen weights": states, **dict(zip(CATEGORIES, step.by_category, strict=True))}
    return sum(on_device(ledger, target).values())
