"""Frozen weights: quantized as bitsandbytes does, computed with as if they were dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from edgepeft.engine.model.frozen import (
    DenseWeight,
    Int8Weight,
    Nf4Weight,
    Workspace,
    bitsandbytes_functional,
    freeze,
)
from edgepeft.memory.chunks import NF4_BLOCK

CPU = torch.device("cpu")
SHAPES = [(96, 64), (33, 96), (5, 63), (256, 576), (130, 257)]


def matrix(shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def read_back(state: Any, packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Dequantized by the definition: code times absmax of its block of 64 over the row-major entries."""
    absmax = state.state2.code[state.absmax.long()] * state.state2.absmax.repeat_interleave(256)[: len(state.absmax)]
    absmax = absmax + state.offset
    data = packed.reshape(-1)
    codes = torch.stack([data >> 4, data & 15], dim=1).reshape(-1)[: shape[0] * shape[1]].long()
    return (state.code[codes] * absmax[torch.arange(len(codes)) // NF4_BLOCK]).view(shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_by_chunks_has_the_bits_of_quantizing_at_once(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = matrix(shape, dtype)
    packed, state = bitsandbytes_functional().quantize_4bit(
        weight, blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=True
    )
    for chunk in (64 * 37, 1 << 20):
        ours = Nf4Weight.quantize(weight, Workspace(CPU, torch.float32), chunk=chunk)
        assert ours.nested is not None
        assert torch.equal(ours.packed, packed.reshape(-1))
        assert torch.equal(ours.absmax, state.absmax)
        assert torch.equal(ours.nested[0], state.state2.absmax)
        assert torch.equal(ours.nested[1], state.state2.code)
        assert torch.equal(ours.nested[2], state.offset)


def test_a_chunk_that_cuts_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="cut a block"):
        Nf4Weight.quantize(matrix((8, 64)), Workspace(CPU, torch.float32), chunk=100)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_dequantizes_by_its_definition_for_every_shape(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = matrix(shape)
    packed, state = bitsandbytes_functional().quantize_4bit(
        weight, blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=True
    )
    expected = read_back(state, packed, shape).to(dtype)
    ours = Nf4Weight.quantize(weight, Workspace(CPU, dtype))
    assert torch.equal(ours.materialize(torch.empty(shape, dtype=dtype)), expected)
    monkeypatch.setattr("edgepeft.engine.model.frozen.CPU_CHUNK", 256)
    assert torch.equal(ours.materialize(torch.empty(shape, dtype=dtype)), expected)


def test_nf4_costs_about_4_127_bits_an_entry() -> None:
    weight = matrix((1024, 1024))
    tensors = Nf4Weight.quantize(weight, Workspace(CPU, torch.float32)).tensors_by_category()
    held = {category: sum(tensor.nbytes for tensor in those) for category, those in tensors.items()}
    assert 8 * sum(held.values()) / weight.numel() == pytest.approx(4.127, abs=2e-3)
    assert held["frozen weights"] == weight.numel() // 2


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_bitsandbytes_row_wise_quantization(shape: tuple[int, int]) -> None:
    weight = matrix(shape, torch.float16)
    codes, absmax, _ = bitsandbytes_functional().int8_vectorwise_quant(weight)
    ours = Int8Weight.quantize(weight, Workspace(CPU, torch.float32))
    assert torch.equal(ours.absmax, absmax.float())
    assert (ours.codes.int() - codes.int()).abs().max() <= 1
    error = (ours.materialize(torch.empty(shape)) - weight.float()).abs()
    assert bool((error <= ours.absmax.unsqueeze(1) / 127 * 0.5001).all())


def test_int8_keeps_rows_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgepeft.engine.model.frozen.CPU_CHUNK", 128)
    weight = matrix((7, 64))
    weight[3] = 0
    values = Int8Weight.quantize(weight, Workspace(CPU, torch.float32)).materialize(torch.empty(7, 64))
    assert bool((values[3] == 0).all())
    assert (values - weight).abs().max() < 0.02


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8", "nf4"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_products_are_those_of_the_materialized_values(precision: Any, compute: Any) -> None:
    weight = freeze(matrix((48, 96), seed=1), precision, compute, CPU)
    dtype = torch.float32 if compute == "fp32" else torch.bfloat16
    dense = weight.materialize(torch.empty(48, 96, dtype=dtype)).clone()
    x, g = matrix((6, 96), dtype, 2).view(2, 3, 96), matrix((6, 48), dtype, 3).view(2, 3, 48)
    assert torch.equal(weight.matmul(x), F.linear(x, dense))
    assert torch.equal(weight.matmul_transposed(g), g @ dense)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "nf4"])
def test_nothing_held_is_an_alias(precision: Any) -> None:
    source = matrix((64, 64))
    weight = freeze(source, precision, "fp32", CPU)
    first = weight.materialize(torch.empty(64, 64))
    before = first.clone()
    source.zero_()
    first.zero_()
    assert torch.equal(weight.materialize(torch.empty(64, 64)), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 96), (1, 1, 96), (96,)])
def test_one_row_in_16_bit_is_the_same_product(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = matrix((48, 96), dtype, 1)
    weight = DenseWeight(values, Workspace(CPU, dtype))
    x = matrix((1, 96), dtype, 2).view(shape)
    found = weight.matmul(x)
    assert found.shape == (*shape[:-1], 48)
    torch.testing.assert_close(found.float(), F.linear(x.float(), values.float()), rtol=1e-2, atol=5e-2)


def test_out_of_another_shape_or_layout_is_refused() -> None:
    weight = freeze(matrix((8, 64)), "nf4", "fp32", CPU)
    with pytest.raises(ValueError, match="contiguous"):
        weight.materialize(torch.empty(64, 8))
    with pytest.raises(ValueError, match="contiguous"):
        weight.materialize(torch.empty(64, 8).t())


def test_layers_share_one_buffer_of_the_largest_matrix() -> None:
    workspace = Workspace(CPU, torch.float32)
    weights = [freeze(matrix(shape), "nf4", "fp32", CPU, workspace) for shape in ((8, 64), (32, 64), (16, 64))]
    assert workspace.nbytes == 0
    for weight in weights:
        weight.matmul(torch.ones(1, 64))
    assert workspace.nbytes == 32 * 64 * 4


def test_a_dense_weight_in_the_compute_dtype_needs_no_buffer() -> None:
    workspace = Workspace(CPU, torch.bfloat16)
    weight = freeze(matrix((8, 64)), "bf16", "bf16", CPU, workspace)
    assert isinstance(weight, DenseWeight)
    weight.matmul(torch.ones(1, 64, dtype=torch.bfloat16))
    assert workspace.nbytes == 0
