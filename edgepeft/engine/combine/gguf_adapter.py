"""A LoRA adapter as the GGUF file that llama.cpp loads beside its base (`--lora`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFType, GGUFWriter, Keys

from edgepeft.engine.combine.gguf_layout import TensorNames
from edgepeft.engine.combine.uniform import UniformLora


def write_gguf_adapter(path: Path, lora: UniformLora, config: Any, *, title: str, base_name: str) -> int:
    """Writes A and B of each linear as `NAME.weight.lora_a` and `.lora_b`, float32; returns the file's bytes.

    llama.cpp computes x Wᵀ + (alpha / rank) (x Aᵀ) Bᵀ with W as its converters lay it out, so the rows of B follow
    those of W.

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
