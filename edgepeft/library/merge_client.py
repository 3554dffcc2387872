"""Starts the process that merges or exports and listens to it; what it made is put in place whole or not at all."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edgepeft.errors import EdgepeftError, ExitCode, error_for_code
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
from edgepeft.models.conversion import ConversionFailed, ConversionProgress, Progress
from edgepeft.processes import ask_worker

_DECODER = msgspec.json.Decoder(ConversionProgress | Merged | Exported | ConversionFailed)


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
        outcome = _run(msgspec.structs.replace(request, work=str(made)), progress)
        assert isinstance(outcome, Merged)
        check_drift(outcome.drift, limit_nats, request.into, force=force)
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
        outcome = _run(msgspec.structs.replace(request, work=str(made)), progress)
        assert isinstance(outcome, Exported)
        put_in_place(made if request.format == "peft" else made / ADAPTER_FILE, target)
    return outcome


def _run(request: MergeRequest | ExportRequest, progress: Progress | None) -> Merged | Exported:
    outcomes: list[Merged | Exported | ConversionFailed] = []

    def hear(line: bytes) -> None:
        try:
            message = _DECODER.decode(line)
        except msgspec.DecodeError:
            return
        if not isinstance(message, ConversionProgress):
            outcomes.append(message)
        elif progress is not None:
            progress(message.phase, message.fraction)

    code, last_line = ask_worker("merge", [], hear, msgspec.json.encode(request))
    outcome = outcomes[-1] if outcomes else None
    if isinstance(outcome, Merged | Exported) and code == 0:
        return outcome
    if isinstance(outcome, ConversionFailed):
        raise error_for_code(outcome.code, outcome.what, where=outcome.where, hint=outcome.hint)
    raise _died(code, request, last_line)


def _died(code: int, request: MergeRequest | ExportRequest, last_line: str) -> EdgepeftError:
    if code in (-9, 137):
        return error_for_code(
            ExitCode.OUT_OF_MEMORY,
            "the system ended the work, most likely because memory ran out",
            where=request.base,
            hint="Close other programs and try again",
        )
    reason = f": {last_line}" if last_line else ""
    return error_for_code(ExitCode.BUG, f"the work ended with code {code}{reason}", where=request.adapter)
