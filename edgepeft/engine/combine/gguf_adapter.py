"""A LoRA adapter as the GGUF file that llama.cpp loads beside its base (`--lora`): written, and read back.

llama.cpp computes x Wᵀ + (alpha / rank) (x Aᵀ) Bᵀ with W as its converters lay it out, so the rows of B follow those
of W. A and B of each linear are `NAME.weight.lora_a` and `.lora_b`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFType, GGUFWriter, Keys, ReaderTensor
from torch import Tensor

from edgepeft.engine.combine.gguf_layout import LAYOUTS, TensorNames
from edgepeft.engine.combine.uniform import UniformLora
from edgepeft.engine.model.gguf import dequantize_rows, open_gguf
from edgepeft.engine.model.gguf_metadata import gguf_value
from edgepeft.errors import BadInput

_ALORA = "adapter.alora.invocation_tokens"
_SIDES = (".lora_a", ".lora_b")


def write_gguf_adapter(path: Path, lora: UniformLora, config: Any, *, title: str, base_name: str) -> int:
    """Writes A and B of each linear in float32; returns the file's bytes.

    Args:
        path: of the file.
        lora: of one rank and one alpha.
        config: transformers' config of the base.
        title: what the file says that it is.
        base_name: of the base, for the file's metadata.

    Raises:
        BadInput: the base's architecture is not known, or has no place for a linear.
    """
    names = TensorNames(config)
    writer = GGUFWriter(str(path), names.layout.name)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, lora.alpha)
    writer.add_name(title)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base_name)
    for module, (A, B) in lora.pairs.items():
        name = names.find(f"{module}.weight")
        assert name is not None
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(A.numpy()))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(names.reorder_rows(module, B).numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with path.open("rb+") as written:
        os.fsync(written.fileno())
    return path.stat().st_size


class GgufLora:
    """A LoRA in a GGUF file, of whatever types of tensors.

    Args:
        path: of the file.
        config: transformers' config of the base.
        shapes: [out, in] of each of its decoder linears by path.
        base: its name, for messages.

    Raises:
        BadInput: the file is damaged, holds something else, is of another architecture than the base, or changes more
            than its linears.
    """

    def __init__(self, path: Path, config: Any, shapes: Mapping[str, tuple[int, int]], base: str) -> None:
        self._where = str(path)
        reader = open_gguf(path)
        self._check_kind(gguf_value(reader, "general.type"), gguf_value(reader, Keys.Adapter.TYPE))
        if reader.get_field(_ALORA) is not None:
            raise BadInput("is an activated LoRA, which acts after some tokens only", where=self._where)
        architecture = gguf_value(reader, "general.architecture")
        layout = LAYOUTS.get(config.model_type)
        if layout is None or layout.name != architecture:
            known = f"is a {layout.name}" if layout else f"({config.model_type}) is of none that is read here"
            raise BadInput(
                f"is of the architecture {architecture!r}, and {base} {known}",
                where=self._where,
                hint="Name the base that it was trained on with --base",
            )
        self._alpha = gguf_value(reader, Keys.Adapter.LORA_ALPHA)
        if self._alpha is not None and not isinstance(self._alpha, int | float):
            raise BadInput("its alpha is no number", where=self._where, hint=_ANEW)
        self._names = TensorNames(config)
        paths = {self._names.find(f"{module}.weight"): module for module in shapes}
        self._found: dict[str, dict[str, ReaderTensor]] = {}
        for tensor in reader.tensors:
            name, side = tensor.name[:-7], tensor.name[-7:]
            if side not in _SIDES or name not in paths:
                raise self._misplaced(tensor.name, base)
            self._found.setdefault(paths[name], {})[side] = tensor
        if not self._found:
            raise BadInput("holds no tensors", where=self._where, hint=_ANEW)

    def alpha(self, A: Tensor) -> float | None:
        """The alpha of an update with this A; None where the file does not say one."""
        # To llama.cpp an alpha of 0 means that nothing is scaled.
        return float(A.shape[0]) if self._alpha == 0 else self._alpha

    def pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Path of each linear, A [rank, in] and B [out, rank] in transformers' order of rows, float32.

        Raises:
            BadInput: half of a pair is missing, or a tensor cannot be read.
        """
        for module, sides in self._found.items():
            for side, other in zip(_SIDES, reversed(_SIDES), strict=True):
                if side not in sides:
                    raise BadInput(
                        f"{sides[other].name} is there without its {side[1:]}: half of a pair is missing",
                        where=self._where,
                        hint=_ANEW,
                    )
            A, B = (self._matrix(sides[side]) for side in _SIDES)
            heads = self._names.heads_to_interleave(module)
            if heads is not None and B.shape[0] % (2 * heads):
                raise BadInput(
                    f"{sides['.lora_b'].name} has {B.shape[0]} rows, which are no {heads} heads",
                    where=self._where,
                    hint="It belongs to another base",
                )
            yield module, A, self._names.restore_rows(module, B)

    def _matrix(self, tensor: ReaderTensor) -> Tensor:
        try:
            value = torch.from_numpy(np.ascontiguousarray(dequantize_rows(tensor)))
        except (NotImplementedError, ValueError, IndexError) as error:
            raise BadInput(
                f"tensor {tensor.name} is of the type {tensor.tensor_type.name} and cannot be read: {error}",
                where=self._where,
                hint="Convert the LoRA to f32, f16 or q8_0",
            ) from error
        if value.dim() != 2:
            told = "×".join(map(str, value.shape))
            raise BadInput(f"tensor {tensor.name} is {told}, not a matrix", where=self._where, hint=_ANEW)
        return value

    def _check_kind(self, kind: Any, adapter: Any) -> None:
        if kind in (None, GGUFType.MODEL):
            raise BadInput(
                "is a whole model, not a LoRA", where=self._where, hint=f"Use: edgepeft models add {self._where}"
            )
        if kind != GGUFType.ADAPTER or adapter != "lora":
            what = f"an adapter of the type {adapter!r}" if kind == GGUFType.ADAPTER else f"of the type {kind!r}"
            raise BadInput(f"is {what}, and only LoRA can be imported", where=self._where)

    def _misplaced(self, name: str, base: str) -> BadInput:
        if name.startswith(("token_embd.", "output.")):
            what = "embeddings" if name.startswith("token_embd.") else "the output head"
            return BadInput(
                f"changes {what} (tensor {name}), and only linears of the layers can be changed here",
                where=self._where,
                hint="Train the LoRA without it",
            )
        return BadInput(f"tensor {name} fits no linear of {base}'s layers", where=self._where, hint=_ANEW)


_ANEW = "It was damaged, or belongs to another base: save it anew where it was made"
