"""A merge or an export from its request to its files."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import msgspec
from torch import Tensor

from edgepeft.engine.combine.base_files import BaseFiles, locate
from edgepeft.engine.combine.drift import measure_drift
from edgepeft.engine.combine.gguf_adapter import write_gguf_adapter
from edgepeft.engine.combine.gguf_model import FileKind, GgufModel, check_tokenizer
from edgepeft.engine.combine.merge import MergedWeights, changes_of
from edgepeft.engine.combine.model_folder import size_of, write_small_files, write_weights
from edgepeft.engine.combine.outline import open_outline, shapes_of, trained_values
from edgepeft.engine.combine.uniform import is_plain_lora, make_uniform, write_peft_folder
from edgepeft.engine.heap import trim_heap
from edgepeft.engine.methods.files import read_adapter, save_adapter
from edgepeft.engine.model.frozen import DTYPES
from edgepeft.engine.model.gguf import convert_gguf
from edgepeft.engine.simulate.model import read_config
from edgepeft.errors import DiskProblem
from edgepeft.library.merging import (
    ADAPTER_FILE,
    MERGE_RECORD,
    MODEL_FILE,
    Drift,
    Exported,
    ExportRequest,
    Merged,
    MergeRequest,
    drift_text,
)
from edgepeft.library.store import CONFIG_FILE, WEIGHTS_FILE, open_adapter, weights_digest
from edgepeft.methods import id_of
from edgepeft.models.source_folder import read_json
from edgepeft.models.store import ModelEntry, find_model, verify_unchanged
from edgepeft.processes import Progress
from edgepeft.units import MIB, format_bytes

_SPARE_BYTES = 64 * MIB


def merge(request: MergeRequest, progress: Progress) -> Merged:
    """Writes the merged model into `request.work` and measures how far it is from the adapter on its base.

    Raises:
        BadInput: the base or the adapter cannot be merged, or not into this format.
        DiskProblem: the disk has too little room.
    """
    progress("opening the base", None)
    entry = find_model(request.base)
    verify_unchanged(entry)
    work, adapter_folder = Path(request.work), Path(request.adapter)
    files, outline = BaseFiles(entry), open_outline(entry)
    adapter = read_adapter(adapter_folder, outline, "merged")
    changes = changes_of(adapter, outline, files, request.adapter)
    with contextlib.ExitStack() as opened:
        trained: dict[str, Callable[[], Tensor]] = {}
        if request.into == "dequantized":
            shapes = shapes_of(outline)
            names = locate(shapes, files.tensors, entry.weights)
            values = opened.enter_context(
                trained_values(entry, files, names, shapes, request.precision, request.compute_dtype)
            )
            trained = {name: partial(values, path) for path, name in names.items()}
        merged = MergedWeights(files, changes, DTYPES[request.dtype], trained)
        if request.format == "safetensors":
            size, notes, folder = _write_folder(request, entry, merged, progress), list[str](), work
        else:
            size, notes = _write_gguf(request, entry, merged, progress)
            folder = work / "read-back"
    trim_heap()
    drift = measure_drift(
        entry, adapter_folder, folder, request.prompts, request.precision, request.compute_dtype, progress
    )
    if folder != work:
        shutil.rmtree(folder)
    else:
        _write_provenance(request, entry, id_of(adapter.config), merged.changed, drift)
    return Merged(size_bytes=size, changed=merged.changed, tensors=len(merged.tensors), drift=drift, notes=tuple(notes))


def export(request: ExportRequest, progress: Progress) -> Exported:
    """Writes the adapter into `request.work`: a plain LoRA as every program reads it, others as PEFT has them.

    Raises:
        BadInput: llama.cpp has no place for it.
    """
    progress("opening the adapter", None)
    entry = find_model(request.base)
    outline = open_outline(entry)
    adapter = read_adapter(Path(request.adapter), outline, "exported")
    progress("writing", None)
    work = Path(request.work)
    if request.format == "peft" and not is_plain_lora(adapter):
        save_adapter(work, adapter, entry.name)
        size = sum((work / name).stat().st_size for name in (CONFIG_FILE, WEIGHTS_FILE))
        return Exported(size_bytes=size, method=id_of(adapter.config), modules=len(adapter.updates))
    lora = make_uniform(adapter, shapes_of(outline), request.adapter)
    if request.format == "peft":
        size = write_peft_folder(work, lora, entry.name)
    else:
        config = read_config(read_json(Path(entry.folder) / "config.json"))
        size = write_gguf_adapter(work / ADAPTER_FILE, lora, config, title=request.title, base_name=entry.name)
    filled = len(lora.pairs) - len(adapter.updates)
    notes = (f"{filled} linears in layers that it does not change are filled with zeros",) if filled else ()
    return Exported(size, id_of(adapter.config), len(lora.pairs), rank=lora.rank, alpha=lora.alpha, notes=notes)


def _write_folder(request: MergeRequest, entry: ModelEntry, merged: MergedWeights, progress: Progress) -> int:
    work = Path(request.work)
    _require_space(work, sum(map(size_of, merged.tensors.values())))
    size = write_weights(work, merged, request.max_shard_bytes, progress)
    write_small_files(work, entry, merged.dtype, request.template, request.stop_ids)
    return size


def _write_gguf(
    request: MergeRequest, entry: ModelEntry, merged: MergedWeights, progress: Progress
) -> tuple[int, list[str]]:
    """Writes the file, then reads it back as our own loader does: what it holds is measured, not what was meant."""
    work = Path(request.work)
    model = GgufModel(
        entry,
        merged,
        cast(FileKind, request.format.removeprefix("gguf-")),
        title=request.title,
        adapter=request.adapter_name,
        template=request.template,
        stop_ids=request.stop_ids,
    )
    in_bf16 = sum(size_of(tensor) // tensor.dtype.itemsize * 2 for tensor in merged.tensors.values())
    _require_space(work, model.size_bytes + in_bf16)
    path, read_back = work / MODEL_FILE, work / "read-back"
    model.write(path, progress)
    read_back.mkdir()
    convert_gguf(path, read_back, lambda _, fraction: progress("reading the file back", fraction))
    check_tokenizer(Path(entry.folder), read_back)
    return path.stat().st_size, model.notes


def _write_provenance(request: MergeRequest, entry: ModelEntry, method: str, changed: int, drift: Drift) -> None:
    content = {
        "base": entry.name,
        "base_fingerprint": entry.fingerprint,
        "adapter": request.adapter_name,
        "method": method,
        "adapter_weights": weights_digest(open_adapter(Path(request.adapter))),
        "into": request.into,
        "dtype": request.dtype,
        "changed_tensors": changed,
        "drift": drift,
    }
    work = Path(request.work)
    encoded = msgspec.json.format(msgspec.json.encode(content), indent=2)
    (work / MERGE_RECORD).write_bytes(encoded + b"\n")
    # What hubs and other programs read; a licence that a GGUF file names is in no other file.
    fields = {"license": entry.licence, "base_model": entry.name, "library_name": "transformers"}
    front = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items() if value]
    text = (
        f"{request.adapter_name} merged into the {request.into} weights of {entry.name} ({entry.fingerprint}), in "
        f"{request.dtype}. Compared with the adapter on its base: {drift_text(drift)}."
    )
    lines = ["---", *front, "---", "", f"# {request.title}", "", text, ""]
    (work / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _require_space(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes + _SPARE_BYTES:
        raise DiskProblem(
            f"about {format_bytes(needed_bytes)} are needed here, {format_bytes(free)} are free",
            where=str(folder.parent.parent),
            hint="Free some space, or write to another disk",
        )
