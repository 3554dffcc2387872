"""From a GGUF file to the folder that transformers reads: bf16 safetensors, config, tokenizer and chat template.

Names, the permutation of Llama's query and key rows, and Gemma's norm offset are transformers' own; the weights come
through the `gguf` package, one tensor at a time, so that memory stays near the largest tensor in float32.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from edgepeft.engine.model.gguf_metadata import (
    attention_settings,
    gguf_value,
    rope_parameters,
    write_generation_config,
    write_gguf_tokenizer,
)
from edgepeft.engine.model.safetensors_stream import SafetensorsStream
from edgepeft.errors import BadInput
from edgepeft.models.conversion import Converted

_CHUNK_ENTRIES = 1 << 22
_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def convert_gguf(source: Path, folder: Path, progress: Callable[[str, float | None], None]) -> Converted:
    """Writes the model in `source` into the existing, empty `folder`.

    Returns:
        Notes for the user, such as what the file's quantization was, and the licence that the file names.

    Raises:
        BadInput: the file is no GGUF, is cut short, or its architecture or tokenizer cannot be converted.
    """
    progress("reading", None)
    reader = open_gguf(source)
    architecture = str(gguf_value(reader, "general.architecture") or "")
    config, processor = _read_config(source, reader, architecture)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    mapping: dict[str, str] = get_gguf_hf_weights_map(model, processor)
    shapes = _target_shapes(model, mapping, reader, source)
    with SafetensorsStream(folder / "model.safetensors", shapes, torch.bfloat16) as stream:
        converter = _TensorConverter(mapping, processor, shapes, reader.tensors)
        done, total = 0, sum(int(tensor.n_bytes) for tensor in reader.tensors)
        for tensor in reader.tensors:
            if (converted := converter.convert(tensor)) is not None:
                stream.write(*converted)
            done += int(tensor.n_bytes)
            progress("converting", done / max(1, total))
    progress("tokenizer", None)
    _write_config(folder, config, type(model).__name__)
    write_gguf_tokenizer(source, folder, reader, context_length=config.max_position_embeddings)
    write_generation_config(folder, reader)
    licence = gguf_value(reader, "general.license")
    return Converted(notes=tuple(_origin_notes(reader)), licence=str(licence) if licence else None)


def _origin_notes(reader: GGUFReader) -> list[str]:
    kinds = Counter(tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1)
    main = kinds.most_common(1)[0][0] if kinds else "F32"
    notes = [f"converted to bf16 from a GGUF whose weights are {main}"]
    if re.match(r"I?Q[1-5]|MXFP4|NVFP4", main):
        notes.append("these weights were rounded to few bits once; holding them in NF4 rounds them a second time")
    return notes


def open_gguf(path: Path) -> GGUFReader:
    """The file's metadata and its memory-mapped tensors.

    Raises:
        BadInput: it is no GGUF, or ends too early.
    """
    try:
        return GGUFReader(str(path))
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise BadInput(
            f"not a complete GGUF file: {error}", where=str(path), hint="Copy or download the file anew"
        ) from error


def _read_config(source: Path, reader: GGUFReader, architecture: str) -> tuple[PretrainedConfig, TensorProcessor]:
    try:
        values: dict[str, Any] = load_gguf_checkpoint(str(source))["config"]
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=values)
        config = AutoConfig.for_model(**values)
        AutoModelForCausalLM._model_mapping[type(config)]
    except (ValueError, KeyError, TypeError, NotImplementedError, IndexError) as error:
        raise BadInput(
            f"GGUF files of the architecture {architecture or 'unknown'!r} cannot be converted",
            where=str(source),
            hint="Bring the model's original safetensors folder instead: edgepeft models add DIR",
        ) from error
    rows = {tensor.name: int(tensor.shape[-1]) for tensor in reader.tensors}.get("token_embd.weight")
    if rows:
        config.vocab_size = rows
    if expert_width := gguf_value(reader, f"{architecture}.expert_feed_forward_length"):
        config.moe_intermediate_size = int(expert_width)
    for name, value in attention_settings(reader, architecture, config).items():
        setattr(config, name, value)
    if (rope := rope_parameters(reader, architecture, config)) is not None:
        config.rope_parameters = rope
    return config, processor


def _target_shapes(
    model: torch.nn.Module, mapping: dict[str, str], reader: GGUFReader, source: Path
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors to write, by name; every parameter of the model must come from the file."""
    sources = {_without_suffix(tensor.name, mapping) for tensor in reader.tensors}
    wanted = {mapping[name] for name in sources if name in mapping}
    parameters = dict(model.named_parameters())
    missing = sorted(set(parameters) - wanted - {"lm_head.weight"})
    if missing:
        raise BadInput(
            f"{len(missing)} tensors are missing, among them {missing[0]}",
            where=str(source),
            hint="Copy or download the file anew",
        )
    state = model.state_dict()
    return {name: tuple(state[name].shape) for name in state if name in wanted}


class _TensorConverter:
    """Turns the file's tensors, in their order, into transformers' tensors."""

    def __init__(
        self,
        mapping: dict[str, str],
        processor: TensorProcessor,
        shapes: dict[str, tuple[int, ...]],
        tensors: list[ReaderTensor],
    ) -> None:
        self._mapping = mapping
        self._processor = processor
        self._shapes = shapes
        # Gate and up experts of one layer fill two halves of one tensor, which is held until both have come.
        self._awaited = Counter(mapping.get(_without_suffix(tensor.name, mapping)) for tensor in tensors)
        self._held: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}

    def convert(self, tensor: ReaderTensor) -> tuple[str, torch.Tensor] | None:
        """The tensor that is finished with this one, and its name; None while a part is awaited, or without use.

        Raises:
            BadInput: the architecture has no place for it.
        """
        target = self._mapping.get(_without_suffix(tensor.name, self._mapping))
        if target is None or target not in self._shapes:
            if tensor.name in _ROPE_TENSORS or tensor.name.endswith(("attn_rot_embd.weight", "rope_freqs.weight")):
                return None
            raise BadInput(f"the tensor {tensor.name} has no place in this architecture", hint=_ORIGINAL)
        result = self._processor.process(
            dequantize_rows(tensor), tensor.name, tensor_key_mapping=self._mapping, parsed_parameters=self._held
        )
        self._awaited[target] -= 1
        if result.name is not None:
            return target, torch.from_numpy(np.ascontiguousarray(result.weights))
        if self._awaited[target]:
            return None
        return target, self._held["tensors"].pop(target)


def dequantize_rows(tensor: ReaderTensor) -> np.ndarray:
    """The tensor as float32 [rows…, columns], made in slices so that temporaries stay small."""
    shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
    out = np.empty(shape, np.float32)
    data = tensor.data.reshape(-1, tensor.data.shape[-1])
    flat = out.reshape(-1, shape[-1])
    step = max(1, _CHUNK_ENTRIES // shape[-1])
    for begin in range(0, len(flat), step):
        flat[begin : begin + step] = dequantize(data[begin : begin + step], tensor.tensor_type)
    return out


def _without_suffix(name: str, mapping: dict[str, str]) -> str:
    """Fused experts are named without `.weight` in transformers' map."""
    bare = name.removesuffix(".weight")
    return bare if name not in mapping and bare in mapping else name


def _write_config(folder: Path, config: PretrainedConfig, architecture: str) -> None:
    values = config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "torch_dtype"):
        values.pop(key, None)
    values |= {"architectures": [architecture], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


_ORIGINAL = "Bring the model's original safetensors folder instead: edgepeft models add DIR"
