"""Starts the process that reads a LoRA file, and publishes what it made as an adapter in PEFT's format."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections import Counter
from datetime import UTC
from pathlib import Path
from typing import Any

import msgspec

from edgepeft.library.card import Card, ChangedParameter, Origin
from edgepeft.library.combined_card import pattern_of
from edgepeft.library.lora_file import Imported, ImportRequest, LoraFile
from edgepeft.library.peft_config import plain_lora_config
from edgepeft.library.store import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterFolder,
    check_same_base,
    publish,
    resolve_adapter,
)
from edgepeft.models.headers import TensorHeader, read_file_header
from edgepeft.models.store import ModelEntry
from edgepeft.paths import check_name, home, make_folder, temporary_folder, write_atomic
from edgepeft.processes import Progress, Task, run_task


def import_lora(
    file: LoraFile, name: str, base: ModelEntry, alpha: float | None, progress: Progress | None = None
) -> tuple[AdapterFolder, Imported]:
    """Publishes the LoRA of a file as the next version of `name`; the file stays as it is.

    Args:
        file: of `find_lora_file`.
        name: library name.
        base: the model that the LoRA belongs to; every tensor must have its sizes.
        alpha: what the update is scaled by, times the rank; None for what the file says.
        progress: told how far it is.

    Returns:
        The new version, and what the engine found.

    Raises:
        UsageError: `name` cannot be a name.
        BadInput: the file is damaged, is no LoRA, does not fit the base, or nothing tells its alpha; or `name` is known
            over another base.
        DiskProblem: the disk is full, or may not be written.
    """
    check_name(name)
    check_same_base(name, base.fingerprint)
    if file.format == "safetensors":
        read_file_header(Path(file.path))
    # In the cache, which a command clears should it be left behind.
    root = home().cache / "importing"
    make_folder(root)
    with temporary_folder(root) as work:
        request = ImportRequest(base.name, file, alpha, str(work / WEIGHTS_FILE))
        task = Task("import_lora", "the import", file.path, question=msgspec.json.encode(request))
        made = run_task(task, Imported, progress)
        config = _adapter_config(made, base)
        write_atomic(work / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
        card = _imported_card(made, file, base, read_file_header(work / WEIGHTS_FILE).tensors)
        return resolve_adapter(publish(work, name, card)), made


def _adapter_config(made: Imported, base: ModelEntry) -> dict[str, Any]:
    rank = Counter(made.ranks.values()).most_common(1)[0][0]
    alphas = {path: int(alpha) if alpha.is_integer() else alpha for path, alpha in made.alphas.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return plain_lora_config(
        base.name,
        rank,
        alpha,
        made.targets,
        rank_pattern=pattern_of(made.ranks, rank),
        alpha_pattern=pattern_of(alphas, alpha),
    )


def _imported_card(made: Imported, file: LoraFile, base: ModelEntry, tensors: tuple[TensorHeader, ...]) -> Card:
    """The card of an imported LoRA; its name and version are set when it is published."""
    entries = sum(tensor.entries for tensor in tensors)
    with Path(file.path).open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return Card(
        name="",
        version=0,
        base=base.name,
        base_fingerprint=base.fingerprint,
        recipe=None,
        layout=None,
        parameters=tuple(ChangedParameter(tensor.name, tensor.shape) for tensor in tensors),
        trainable_parameters=entries,
        trainable_share=entries / (base.shape.parameters + entries),
        versions=made.versions,
        template=None,
        created=datetime.datetime.now(UTC).isoformat(timespec="seconds"),
        run="",
        steps=0,
        notes=(UNVERIFIED.format(base=base.name), *made.notes),
        imported=Origin(file.path, f"sha256:{digest}", file.format, made.alpha_from),
    )


UNVERIFIED = "its tensors have the sizes of {base}; that it was trained on these weights the file does not tell"
