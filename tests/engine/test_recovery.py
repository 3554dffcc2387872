"""What counts as running out of memory, and which smaller layout comes next."""

from __future__ import annotations

import pytest
import torch

from edgepeft.engine.ledger import BudgetExceeded
from edgepeft.engine.training.recovery import is_out_of_memory, largest_group, smaller_layout
from edgepeft.spec import Layout


def test_the_ladder_of_layouts() -> None:
    layout = Layout(micro_batch_tokens=4096, checkpointing="none", loss_chunk_tokens=256)
    found = smaller_layout(layout, 1000, 3)
    assert found is not None
    assert found[0].micro_batch_tokens == 500
    seen = []
    step = smaller_layout(layout, 900, 1)
    while step is not None:
        seen.append((step[0].checkpointing, step[0].loss_chunk_tokens))
        step = smaller_layout(step[0], 900, 1)
    assert seen == [("layer", 256), ("layer", 64), ("layer", 16)]


def test_on_a_card_inputs_of_layers_go_to_the_host_before_the_loss_slows_down() -> None:
    seen = []
    step = smaller_layout(Layout(micro_batch_tokens=4096, checkpointing="none"), 900, 1, card=True)
    while step is not None:
        seen.append((step[0].checkpointing, step[0].loss_chunk_tokens))
        step = smaller_layout(step[0], 900, 1, card=True)
    assert seen == [("layer", 256), ("offload", 256), ("offload", 64), ("offload", 16)]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
        BudgetExceeded("12 live bytes are more than the budget of 10"),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shape mismatch"), ValueError("DefaultCPUAllocator"), RuntimeError("CUDA error: an illegal access")],
)
def test_what_does_not(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_the_largest_group_of_a_step() -> None:
    assert largest_group([30, 50, 20, 40], 80) == (80, 2)
    assert largest_group([300, 50], 80) == (300, 1)
    assert largest_group([], 80) == (0, 0)
