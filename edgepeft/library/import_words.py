"""From what a person names to an adapter in the library; the command line and the terminal UI use it."""

from __future__ import annotations

import math
from pathlib import Path

from edgepeft.errors import UsageError
from edgepeft.library.import_client import UNVERIFIED, import_lora
from edgepeft.library.lora_file import LoraFile, find_lora_file
from edgepeft.library.store import AdapterFolder, check_base, import_adapter, open_adapter, resolve_adapter
from edgepeft.models.store import find_model
from edgepeft.processes import Progress


def import_path(
    path: Path, name: str, base: str | None = None, alpha: float | None = None, progress: Progress | None = None
) -> tuple[AdapterFolder, list[str]]:
    """Copies an adapter into the library as the next version of `name`.

    Args:
        path: a folder that PEFT or edgepeft saved, or a LoRA's file or folder that `find_lora_file` knows.
        name: in the library.
        base: model that it belongs to: needed for a file, checked for a folder.
        alpha: of a LoRA whose file does not say it.
        progress: told how far a file's conversion is.

    Returns:
        The new version, and what a person should be warned of.

    Raises:
        UsageError: what was said cannot be meant, or the base of a file is not.
        BadInput: the adapter cannot be used, or belongs to another base.
        DiskProblem: the disk is full, or may not be written.
    """
    file = find_lora_file(path)
    if file is not None:
        return _import_file(file, name, base, alpha, progress)
    if alpha is not None:
        raise UsageError("the adapter's own config says its alpha", where="--alpha", hint="Leave the option out")
    whole = path.expanduser()
    folder = whole if whole.is_dir() else whole.parent
    warnings = check_base(open_adapter(folder), find_model(base)) if base else []
    return resolve_adapter(import_adapter(folder, name)), warnings


def _import_file(
    file: LoraFile, name: str, base: str | None, alpha: float | None, progress: Progress | None
) -> tuple[AdapterFolder, list[str]]:
    if base is None:
        raise UsageError(
            "the file does not say which base model it belongs to",
            where=file.path,
            hint="Add --base MODEL; see: edgepeft models list",
        )
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise UsageError(f"an alpha of {alpha:g} is not possible", where="--alpha", hint="Give a number above 0")
    entry = find_model(base)
    adapter, made = import_lora(file, name, entry, alpha, progress)
    return adapter, [f"{adapter.reference}: {UNVERIFIED.format(base=entry.name)}", *made.notes]
