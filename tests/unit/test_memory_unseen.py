"""The table of what no dry run shows."""

from __future__ import annotations

import pytest

from edgepeft.memory.estimate import estimate_training
from edgepeft.memory.target import CPU, Target
from edgepeft.memory.unseen import (
    TABLE,
    Capability,
    efficient_backward,
    flash_backward,
    total_bytes,
    unseen,
    unseen_bytes,
)
from edgepeft.memory.workload import full_workload
from edgepeft.spec import ComputeDtype
from edgepeft.units import MIB
from shapes import llama_shape, run_spec


@pytest.mark.parametrize(
    ("capability", "workspace_bytes"),
    [(None, 17_039_360), ((7, 5), 17_039_360), ((8, 9), 17_039_360), ((9, 0), 64 * MIB), ((12, 0), 17_039_360)],
)
def test_every_card_has_one_row_for_cublas_and_hopper_a_larger_one(
    capability: Capability | None, workspace_bytes: int
) -> None:
    rows = [row for row in unseen(Target("cuda", capability)) if "cuBLAS" in row.name]
    assert [row.size_bytes for row in rows] == [workspace_bytes]
    assert unseen_bytes(Target("cuda", capability), in_allocator=True) == workspace_bytes


def test_the_context_is_outside_the_allocator() -> None:
    outside = unseen_bytes(Target("cuda"), in_allocator=False)
    assert outside == sum(row.size_bytes for row in TABLE if row.category == "device context")
    assert 272 * MIB < outside < 600 * MIB  # published contexts, and kernels on top


def test_the_processor_has_none_of_it() -> None:
    assert unseen(CPU) == ()


def test_every_figure_says_where_it_is_from() -> None:
    assert all(row.source and row.provenance in ("measured", "published", "assumed") for row in TABLE)


def test_flash_attention_keeps_float32_sums_and_expands_grouped_heads() -> None:
    rows = flash_backward(tokens=1024, samples=2, heads=8, kv_heads=2, head_dim=80, compute_bytes=2)
    padded_rows = 1024 + 2 * 128
    assert [row.size_bytes for row in rows] == [
        4 * padded_rows * 8 * 96,
        4 * padded_rows * 8,
        2 * 2 * 1024 * 8 * 80,
    ]


def test_without_grouped_heads_flash_attention_expands_nothing() -> None:
    rows = flash_backward(tokens=1024, samples=1, heads=8, kv_heads=8, head_dim=256, compute_bytes=2)
    assert [row.size_bytes for row in rows] == [4 * 1152 * 8 * 256, 4 * 1152 * 8]


def test_memory_efficient_attention_sums_in_float32() -> None:
    assert total_bytes(efficient_backward(tokens=512, heads=8, head_dim=64)) == 4 * 8 * 512 * 65
    # Of larger heads, keys and values too, as far as they are split.
    assert total_bytes(efficient_backward(tokens=512, heads=8, head_dim=128)) == 4 * 8 * 512 * (129 + 256)
    assert total_bytes(efficient_backward(tokens=4096, heads=200, head_dim=128)) == 4 * 200 * (4096 * 129 + 256 * 128)


@pytest.mark.parametrize(("precision", "capability"), [("bf16", (8, 9)), ("fp16", (7, 5))])
def test_the_closed_form_of_a_card_includes_the_scratch_of_its_attention(
    precision: ComputeDtype, capability: Capability
) -> None:
    # Hardly any MLP: the highest point of a backward is in the attention.
    shape = llama_shape(hidden=1024, intermediate=64, layers=2, heads=32, kv_heads=4, vocab=500)
    spec = run_spec(micro_batch_tokens=4096, compute_dtype=precision, rank=1)
    step = next(
        phase
        for phase in estimate_training(spec, shape, full_workload(4096, 4096), Target("cuda", capability)).phases
        if phase.name == "train step"
    )
    head_dim = shape.head_dim
    if precision == "bf16":
        scratch = flash_backward(tokens=4096, samples=1, heads=32, kv_heads=4, head_dim=head_dim, compute_bytes=2)
    else:
        scratch = efficient_backward(tokens=4096, heads=32, head_dim=head_dim)
    assert step.bytes_by_category["recomputed layer"] > total_bytes(scratch)
