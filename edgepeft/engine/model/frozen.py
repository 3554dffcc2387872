"""Frozen weight matrices: dense, NF4 and int8, behind one protocol.

The base never changes, so whatever holds a matrix also computes with it, and nothing of it is ever saved for backward.
A matrix that is not held in the compute dtype is dequantized into a `Workspace` that all layers of a model share: only
one dense matrix exists at a time.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from edgepeft.engine.kernels import dequantize_4bit, one_of, target_of, to_device
from edgepeft.engine.ledger import assign
from edgepeft.memory.breakdown import Category
from edgepeft.memory.chunks import ABSMAX_BLOCK, CPU_CHUNK, NF4_BLOCK
from edgepeft.spec import ComputeDtype, Precision

DTYPES: dict[ComputeDtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The torch dtype of each name that a recipe uses."""


class Workspace:
    """One buffer for dequantized matrices, grown to the largest that was asked for.

    What `borrow` returns is valid until the next `borrow`. Products on a device are ordered by its stream, so one
    buffer is enough for forward and backward.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._buffer = torch.empty(0, dtype=dtype, device=device)
        self._dynamic_map: Tensor | None = None

    def reserve(self, elements: int) -> None:
        """Grows the buffer to hold `elements` entries."""
        if self._buffer.numel() < elements:
            # The old buffer goes first: both together would be a peak of their own.
            self._buffer = torch.empty(0, dtype=self.dtype, device=self.device)
            self._buffer = torch.empty(elements, dtype=self.dtype, device=self.device)
            # Born in whatever needed it first, it stays.
            assign([self._buffer], "workspace")

    def borrow(self, shape: tuple[int, int]) -> Tensor:
        """A contiguous matrix of `shape`, uninitialised, valid until the next call."""
        elements = shape[0] * shape[1]
        self.reserve(elements)
        return self._buffer[:elements].view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self._buffer.nbytes

    @property
    def dynamic_map(self) -> Tensor:
        """The 256 values of the 8-bit dynamic type, float32; one tensor for all matrices."""
        if self._dynamic_map is None:
            self._dynamic_map = torch.tensor(dynamic_values(), dtype=torch.float32, device=self.device)
        return self._dynamic_map


class FrozenWeight(Protocol):
    """A matrix that never changes, and its products."""

    shape: tuple[int, int]
    """[out_features, in_features]"""
    device: torch.device

    def matmul(self, x: Tensor) -> Tensor:
        """`x @ W.T` for x of shape [..., in], as [..., out]; may use a low-bit kernel; saves nothing."""
        ...

    def matmul_transposed(self, g: Tensor) -> Tensor:
        """`g @ W` for g of shape [..., out], as [..., in]; saves nothing."""
        ...

    def add_matmul_transposed(self, g: Tensor, out: Tensor) -> None:
        """`out += g @ W` in place, for g [rows, out] and `out` [rows, in]; saves nothing."""
        ...

    def materialize(self, out: Tensor) -> Tensor:
        """Writes the dense values into the contiguous `out` and returns it; never an alias of what is held."""
        ...

    def prefetch(self) -> None:
        """A hint that the weight is needed soon; does nothing unless it is streamed."""
        ...

    def tensors_by_category(self) -> dict[Category, list[Tensor]]:
        """What is held, without what all matrices share."""
        ...


class DenseWeight:
    """A matrix held as it is; products in another dtype go through the workspace."""

    def __init__(self, values: Tensor, workspace: Workspace) -> None:
        self.values = values.detach()
        self.shape = (int(values.shape[0]), int(values.shape[1]))
        self.device = values.device
        self._workspace = workspace

    def matmul(self, x: Tensor) -> Tensor:
        """`x @ W.T`."""
        values = self._in_compute_dtype()
        if target_of(x.device).kind == "cpu" and x.element_size() == 2 and x.numel() == x.shape[-1]:
            # One row in 16 bit: torch's matrix-vector product reads the weights faster than its matrix product.
            return torch.mv(values, x.reshape(-1)).view(*x.shape[:-1], -1)
        return F.linear(x, values)

    def matmul_transposed(self, g: Tensor) -> Tensor:
        """`g @ W`."""
        return torch.matmul(g, self._in_compute_dtype())

    def add_matmul_transposed(self, g: Tensor, out: Tensor) -> None:
        """`out += g @ W`."""
        out.addmm_(g, self._in_compute_dtype())

    def materialize(self, out: Tensor) -> Tensor:
        """Copies the values into `out`."""
        _check_out(self.shape, out)
        return out.copy_(self.values)

    def prefetch(self) -> None:
        """Nothing: it is here."""

    def tensors_by_category(self) -> dict[Category, list[Tensor]]:
        """The values."""
        return {"frozen weights": [self.values]}

    def _in_compute_dtype(self) -> Tensor:
        if self.values.dtype == self._workspace.dtype:
            return self.values
        return self.materialize(self._workspace.borrow(self.shape))


class Nf4Weight:
    """A matrix of 4-bit NormalFloat codes in blocks of 64, its absmax values quantized to 8 bit again.

    Dettmers et al. 2023, *QLoRA* (arXiv 2305.14314). The packed data and its constants are held here rather than in
    bitsandbytes' modules, whose CPU forward repacks weights in place.

    Args:
        packed: uint8 [⌈n/2⌉], two codes a byte, high half first, over the row-major entries.
        absmax: uint8 [⌈n/64⌉] with double quantization, else float32 of that shape.
        nested: second-level absmax, float32 [⌈⌈n/64⌉/256⌉], the map of its 256 codes and the subtracted mean; or None.
    """

    def __init__(
        self,
        packed: Tensor,
        absmax: Tensor,
        nested: tuple[Tensor, Tensor, Tensor] | None,
        shape: tuple[int, int],
        workspace: Workspace,
        *,
        block: int = NF4_BLOCK,
        nested_block: int = ABSMAX_BLOCK,
    ) -> None:
        self.packed = packed.reshape(-1)
        self.absmax = absmax
        self.nested = nested
        self.shape = shape
        self.device = packed.device
        self.block = block
        self.nested_block = nested_block
        self._workspace = workspace

    @classmethod
    def quantize(cls, weight: Tensor, workspace: Workspace, *, chunk: int = CPU_CHUNK) -> Nf4Weight:
        """Quantizes a float matrix on the workspace's device.

        On the CPU this goes chunk by chunk and gives the same bits as quantizing at once: blocks do not reach over
        chunks, and the second level is made from all absmax values together, as its offset is their mean.
        """
        bitsandbytes_functional()
        shape = (int(weight.shape[0]), int(weight.shape[1]))
        source = weight.detach()
        flat = (source if source.dtype in DTYPES.values() else source.float()).reshape(-1)
        device = workspace.device
        if target_of(device).kind != "cpu":
            chunk = max(chunk, flat.numel())
        if chunk % NF4_BLOCK:
            raise ValueError(f"a chunk of {chunk} entries would cut a block of {NF4_BLOCK}")
        packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=device)
        absmax = torch.empty(-(-flat.numel() // NF4_BLOCK), dtype=torch.float32, device=device)
        for start in one_of(range(0, flat.numel(), chunk)):
            end = min(start + chunk, flat.numel())
            codes, scales = torch.ops.bitsandbytes.quantize_4bit.default(
                to_device(flat[start:end], device), NF4_BLOCK, "nf4", torch.uint8
            )
            packed[start // 2 : (end + 1) // 2] = codes.reshape(-1)
            absmax[start // NF4_BLOCK : -(-end // NF4_BLOCK)] = scales
            del codes, scales
        offset = absmax.mean()
        codes_of_absmax, nested = torch.ops.bitsandbytes.quantize_blockwise.default(
            absmax - offset, workspace.dynamic_map, ABSMAX_BLOCK
        )
        return cls(packed, codes_of_absmax, (nested, workspace.dynamic_map, offset), shape, workspace)

    def matmul(self, x: Tensor) -> Tensor:
        """`x @ W.T` on dequantized values."""
        return F.linear(x, self.materialize(self._workspace.borrow(self.shape)))

    def matmul_transposed(self, g: Tensor) -> Tensor:
        """`g @ W` on dequantized values."""
        return torch.matmul(g, self.materialize(self._workspace.borrow(self.shape)))

    def add_matmul_transposed(self, g: Tensor, out: Tensor) -> None:
        """`out += g @ W` on dequantized values."""
        out.addmm_(g, self.materialize(self._workspace.borrow(self.shape)))

    def materialize(self, out: Tensor) -> Tensor:
        """Dequantizes into `out` (bfloat16, float16 or float32)."""
        _check_out(self.shape, out)
        bitsandbytes_functional()
        absmax = self._absmax()
        if target_of(out.device).kind == "cpu":
            self._dequantize_on_cpu(absmax, out.view(-1))
        else:
            dequantize_4bit(self.packed, absmax, self.block, out)
        return out

    def prefetch(self) -> None:
        """Nothing: it is here."""

    def tensors_by_category(self) -> dict[Category, list[Tensor]]:
        """Codes, and the constants without the map of 256 values that all matrices share."""
        nested = [] if self.nested is None else [self.nested[0], self.nested[2]]
        return {"frozen weights": [self.packed], "quantization constants": [self.absmax, *nested]}

    def _absmax(self) -> Tensor:
        if self.nested is None:
            return self.absmax
        scales, codes, offset = self.nested
        absmax: Tensor = torch.ops.bitsandbytes.dequantize_blockwise.default(
            self.absmax, scales, codes, self.nested_block, torch.float32
        )
        return absmax.add_(offset)

    def _dequantize_on_cpu(self, absmax: Tensor, flat: Tensor) -> None:
        # bitsandbytes' CPU kernel starts a block with every row and so misplaces absmax where rows are no multiple of a
        # block. Given rows of exactly one block it is right for every shape; chunks keep its result in the cache.
        dequantize = torch.ops.bitsandbytes.dequantize_4bit.default
        block, count = self.block, flat.numel()
        whole = count - count % block
        for start in one_of(range(0, whole, CPU_CHUNK)):
            end = min(start + CPU_CHUNK, whole)
            values = dequantize(
                self.packed[start // 2 : end // 2],
                absmax[start // block : end // block],
                block,
                "nf4",
                ((end - start) // block, block),
                flat.dtype,
            )
            flat[start:end].view(-1, block).copy_(values)
            del values
        if whole < count:
            rest = self.packed[whole // 2 :]
            values = dequantize(rest, absmax[whole // block :], block, "nf4", (1, 2 * rest.numel()), flat.dtype)
            flat[whole:].copy_(values.view(-1)[: count - whole])


class Int8Weight:
    """A matrix of 8-bit integers with one absmax a row: W ≈ codes · absmax / 127.

    The weight half of LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339); products use the dequantized values, so no
    activation is ever quantized.

    Args:
        codes: int8 [out, in].
        absmax: float32 [out], the largest magnitude of each row.
    """

    def __init__(self, codes: Tensor, absmax: Tensor, workspace: Workspace) -> None:
        self.codes = codes
        self.absmax = absmax
        self.shape = (int(codes.shape[0]), int(codes.shape[1]))
        self.device = codes.device
        self._workspace = workspace

    @classmethod
    def quantize(cls, weight: Tensor, workspace: Workspace) -> Int8Weight:
        """Quantizes a float matrix on the workspace's device, some rows at a time."""
        source = weight.detach()
        codes = torch.empty(source.shape, dtype=torch.int8, device=workspace.device)
        absmax = torch.empty(source.shape[0], dtype=torch.float32, device=workspace.device)
        for rows in _row_chunks(int(source.shape[0]), int(source.shape[1])):
            part = to_device(source[rows], workspace.device, torch.float32)
            largest = part.abs().amax(dim=1)
            absmax[rows] = largest
            # A row of zeros has no scale; any positive one gives zeros.
            codes[rows] = (part * (127.0 / largest.clamp(min=1e-30)).unsqueeze(1)).round_().to(torch.int8)
            del part, largest
        return cls(codes, absmax, workspace)

    def matmul(self, x: Tensor) -> Tensor:
        """`x @ W.T` on dequantized values."""
        return F.linear(x, self.materialize(self._workspace.borrow(self.shape)))

    def matmul_transposed(self, g: Tensor) -> Tensor:
        """`g @ W` on dequantized values."""
        return torch.matmul(g, self.materialize(self._workspace.borrow(self.shape)))

    def add_matmul_transposed(self, g: Tensor, out: Tensor) -> None:
        """`out += g @ W` on dequantized values."""
        out.addmm_(g, self.materialize(self._workspace.borrow(self.shape)))

    def materialize(self, out: Tensor) -> Tensor:
        """Dequantizes into `out`, the product rounded once from float32."""
        _check_out(self.shape, out)
        scale = (self.absmax / 127.0).unsqueeze(1)
        # Chunks are for the CPU's caches and its cast; on a card they would only be launches.
        for rows in _row_chunks(*self.shape) if target_of(out.device).kind == "cpu" else [slice(None)]:
            torch.mul(self.codes[rows], scale[rows], out=out[rows])
        return out

    def prefetch(self) -> None:
        """Nothing: it is here."""

    def tensors_by_category(self) -> dict[Category, list[Tensor]]:
        """Codes and row scales."""
        return {"frozen weights": [self.codes], "quantization constants": [self.absmax]}


def freeze(
    weight: Tensor,
    precision: Precision,
    compute_dtype: ComputeDtype,
    device: torch.device,
    workspace: Workspace | None = None,
) -> FrozenWeight:
    """Holds a float matrix [out, in] in `precision` on `device`; the source is not referred to afterwards.

    `workspace` is the buffer shared by a model's layers; without one the weight gets its own.
    """
    shared = workspace or Workspace(device, DTYPES[compute_dtype])
    if precision == "nf4":
        return Nf4Weight.quantize(weight, shared)
    if precision == "int8":
        return Int8Weight.quantize(weight, shared)
    return DenseWeight(weight.detach().to(device, DTYPES[precision], copy=True).contiguous(), shared)


@functools.cache
def bitsandbytes_functional() -> Any:
    """bitsandbytes.functional, imported when first needed; its remarks about optional CPU kernels are silenced."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes import functional

    return functional


@functools.cache
def dynamic_values() -> tuple[float, ...]:
    """The values of the 8-bit dynamic type, ascending (Dettmers et al. 2021, arXiv 2110.02861)."""
    return tuple(bitsandbytes_functional().create_dynamic_map().tolist())


def _row_chunks(rows: int, columns: int) -> list[slice]:
    step = max(1, CPU_CHUNK // max(1, columns))
    return [slice(start, min(start + step, rows)) for start in one_of(range(0, rows, step))]


def _check_out(shape: tuple[int, int], out: Tensor) -> None:
    if tuple(out.shape) != shape or not out.is_contiguous():
        raise ValueError(f"out must be contiguous and of shape {shape}, it is {tuple(out.shape)}")
