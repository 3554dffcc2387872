"""Starts the process that merges or exports and listens to it; what it made is put in place whole or not at all."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edgepeft.library.merging import (
    ADAPTER_FILE,
    MODEL_FILE,
    Exported,
    ExportRequest,
    Merged,
    MergeRequest,
    check_drift,
)
from edgepeft.library.target_path import put_in_place, work_folder
from edgepeft.processes import Progress, Task, run_task


def merge(
    request: MergeRequest, target: Path, limit_nats: float, *, force: bool, progress: Progress | None = None
) -> Merged:
    """Writes a merged model to `target`, a folder or a GGUF file that `check_target` allowed.

    Args:
        request: its `work` is set here.
        target: replaced if it is there.
        limit_nats: mean divergence above which nothing is kept.
        force: keep it whatever it is.
        progress: told how far it is.

    Raises:
        BadInput: the base or the adapter cannot be merged, or the result is too far from the adapter on its base.
        DiskProblem: the disk is full, or may not be written.
    """
    with work_folder(target) as work:
        made = work / "model"
        made.mkdir()
        outcome = run_task(_task(request, made), Merged, progress)
        check_drift(outcome.drift, limit_nats, request.into, force=force, format=request.format, dtype=request.dtype)
        put_in_place(made if request.format == "safetensors" else made / MODEL_FILE, target)
    return outcome


def export(request: ExportRequest, target: Path, progress: Progress | None = None) -> Exported:
    """Writes an adapter to `target`, a folder or a GGUF file that `check_target` allowed.

    Raises:
        BadInput: the adapter cannot be exported.
        DiskProblem: the disk is full, or may not be written.
    """
    with work_folder(target) as work:
        made = work / "adapter"
        made.mkdir()
        outcome = run_task(_task(request, made), Exported, progress)
        put_in_place(made if request.format == "peft" else made / ADAPTER_FILE, target)
    return outcome


def _task(request: MergeRequest | ExportRequest, work: Path) -> Task:
    question = msgspec.json.encode(msgspec.structs.replace(request, work=str(work)))
    name = "the merge" if isinstance(request, MergeRequest) else "the export"
    return Task("merge", name, request.adapter, question=question)
