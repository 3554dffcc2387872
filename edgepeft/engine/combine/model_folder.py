"""A merged model as the folder that transformers loads: safetensors, config, tokenizer, chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from edgepeft.engine.combine.base_files import StoredTensor
from edgepeft.engine.combine.merge import MergedWeights
from edgepeft.engine.model.safetensors_stream import SafetensorsStream
from edgepeft.models.headers import INDEX_NAME
from edgepeft.models.source_folder import SMALL_FILES, read_json
from edgepeft.models.store import ModelEntry
from edgepeft.processes import Progress

_ALONGSIDE = (
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""Files of the base that other programs read."""
_LICENCES = ("LICEN[CS]E*", "NOTICE*", "USE_POLICY*")


def write_weights(folder: Path, merged: MergedWeights, max_shard_bytes: int, progress: Progress) -> int:
    """Writes all tensors into `folder`: one file, or shards with their index; returns the bytes of the tensors.

    Raises:
        BadInput: a tensor has values that its dtype cannot hold.
    """
    shards = plan_shards(merged.tensors, max_shard_bytes)
    total = sum(size_of(merged.tensors[name]) for shard in shards for name in shard)
    done = 0
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        shapes = {name: merged.tensors[name].shape for name in names}
        dtypes = {name: merged.tensors[name].dtype for name in names}
        with SafetensorsStream(folder / file, shapes, dtypes) as stream:
            for name in names:
                progress("merging", done / max(1, total))
                stream.write_parts(name, merged.parts(name))
                done += size_of(merged.tensors[name])
    if len(shards) > 1:
        # The index is for people and tools; both like it sorted.
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / INDEX_NAME, index)
    progress("merging", 1.0)
    return total


def size_of(tensor: StoredTensor) -> int:
    """Its bytes in a file."""
    return torch.Size(tensor.shape).numel() * tensor.dtype.itemsize


def plan_shards(tensors: Mapping[str, StoredTensor], max_shard_bytes: int) -> list[list[str]]:
    """The names of each file, in the order of the base's; only a tensor that is larger by itself exceeds the limit."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        size = size_of(tensor)
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    # Wide dtypes first: torch takes a tensor only where its bytes begin at a multiple of its items.
    return [sorted(names, key=lambda name: -tensors[name].dtype.itemsize) for names in shards]


def write_small_files(
    folder: Path, entry: ModelEntry, dtype: torch.dtype, template: str | None, stop_ids: Sequence[int]
) -> None:
    """Writes config, tokenizer, chat template, generation settings and licences.

    Args:
        folder: of the merged model.
        entry: the base.
        dtype: of the merged weights.
        template: the chat template that the adapter was trained with; None keeps the base's.
        stop_ids: tokens that end an answer, beside those that the base knows.

    Raises:
        BadInput: a file of the base cannot be read.
    """
    source = Path(entry.folder)
    for name in SMALL_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for origin in {Path(entry.weights), Path(entry.source)} - {source}:
        if origin.is_dir():
            found = [origin / name for name in _ALONGSIDE] + [path for glob in _LICENCES for path in origin.glob(glob)]
            for path in found:
                if path.is_file():
                    shutil.copyfile(path, folder / path.name)
    config = merged_config(read_json(source / "config.json"), dtype)
    _write_json(folder / "config.json", config)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        settings_file = folder / "tokenizer_config.json"
        settings = read_json(settings_file) if settings_file.is_file() else {}
        if settings.pop("chat_template", None) is not None:
            _write_json(settings_file, settings)
    _write_json(folder / "generation_config.json", generation_settings(folder, config, stop_ids))


def merged_config(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The base's config for weights that are not quantized, in `dtype`."""
    name = str(dtype).removeprefix("torch.")
    merged = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}
    if "torch_dtype" in config:
        # Older programs know this name only.
        merged["torch_dtype"] = name
    merged["dtype"] = name
    for key, value in merged.items():
        if isinstance(value, Mapping) and {"dtype", "torch_dtype", "quantization_config"} & set(value):
            merged[key] = merged_config(value, dtype)
    return merged


def generation_settings(folder: Path, config: Mapping[str, Any], stop_ids: Sequence[int]) -> dict[str, Any]:
    """generation_config.json with the adapter's stop tokens before the base's."""
    path = folder / "generation_config.json"
    settings: dict[str, Any] = read_json(path) if path.is_file() else {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if settings.get(key) is None and config.get(key) is not None:
            settings[key] = config[key]
    known = settings.get("eos_token_id")
    known = known if isinstance(known, list) else [] if known is None else [known]
    ends = list(dict.fromkeys([*stop_ids, *known]))
    if ends:
        settings["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return settings


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
