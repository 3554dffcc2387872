"""Models that other programs left on this disk: Hugging Face's cache, LM Studio, Ollama, and folders one names."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from edgepeft.errors import BadInput
from edgepeft.models.gguf_header import check_convertible
from edgepeft.models.references import huggingface_cache, is_gguf, newest_snapshot
from edgepeft.models.source_folder import inspect_folder
from edgepeft.models.store import list_models
from edgepeft.paths import home

Origin = Literal["huggingface", "lmstudio", "ollama", "folder"]
_OLLAMA_MODEL = "application/vnd.ollama.image.model"
_DEPTH = 4


class FoundModel(msgspec.Struct, frozen=True):
    """A model on this disk that may be added."""

    origin: Origin
    """Which program it belongs to; `folder` for a folder that was named."""
    kind: Literal["safetensors", "gguf"]
    """Form of its files."""
    name: str
    """As the program calls it."""
    path: str
    """What to give to `edgepeft models add`; absolute."""
    size_bytes: int
    """Of its weights."""
    usable: bool
    """Whether it can be added."""
    reason: str = ""
    """Why it cannot be used; empty when it can."""
    in_store: str | None = None
    """Its name in the store, when it was added already."""


def scan(folders: Sequence[Path] = ()) -> list[FoundModel]:
    """All models that are found, and for each whether it can be used; no weight is read.

    Args:
        folders: folders to search beside those of the known programs, some levels deep.
    """
    added = {entry.source: entry.name for entry in list_models()}
    found: dict[str, FoundModel] = {}
    own = home().models
    for model in _found(folders):
        if Path(model.path).is_relative_to(own):
            continue
        found.setdefault(model.path, msgspec.structs.replace(model, in_store=added.get(model.path)))
    return list(found.values())


def lmstudio_folders() -> list[Path]:
    """Where LM Studio keeps its models, in its newer and its older versions."""
    return [Path.home() / ".lmstudio" / "models", Path.home() / ".cache" / "lm-studio" / "models"]


def ollama_folders() -> list[Path]:
    """Where Ollama keeps its models: OLLAMA_MODELS, else the user's and the Linux service's folder."""
    if named := os.environ.get("OLLAMA_MODELS"):
        return [Path(named).expanduser()]
    return [Path.home() / ".ollama" / "models", Path("/usr/share/ollama/.ollama/models")]


def _found(folders: Sequence[Path]) -> Iterator[FoundModel]:
    for repository in _subfolders(huggingface_cache(), "models--*"):
        snapshot = newest_snapshot(repository)
        if snapshot is not None:
            name = repository.name.removeprefix("models--").replace("--", "/", 1)
            yield from _in_folder(snapshot, "huggingface", name)
    for root in lmstudio_folders():
        for folder in _subfolders(root, "*/*"):
            yield from _in_folder(folder, "lmstudio", folder.relative_to(root).as_posix())
    for root in ollama_folders():
        yield from _ollama(root)
    for root in folders:
        if not root.is_dir():
            raise BadInput("there is no such folder", where=str(root), hint="Name a folder that holds models")
        yield from _walk(root.absolute(), root.absolute(), _DEPTH)


def _subfolders(root: Path, pattern: str) -> list[Path]:
    try:
        return sorted(path for path in root.glob(pattern) if path.is_dir())
    except OSError:
        return []


def _walk(folder: Path, root: Path, depth: int) -> Iterator[FoundModel]:
    name = folder.name if folder == root else folder.relative_to(root).as_posix()
    yield from _in_folder(folder, "folder", name)
    if depth:
        for inner in _subfolders(folder, "[!.]*"):
            if not inner.is_symlink():
                yield from _walk(inner, root, depth - 1)


def _in_folder(folder: Path, origin: Origin, name: str) -> Iterator[FoundModel]:
    """The model of safetensors in this folder, or each GGUF in it."""
    if (folder / "config.json").is_file() and (any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))):
        size = sum(_size(path) for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
        reason = ""
        try:
            inspect_folder(folder)
        except BadInput as error:
            reason = error.what
        yield FoundModel(origin, "safetensors", name, str(folder), size, not reason, reason)
    for file in sorted(folder.glob("*.gguf")):
        if not file.name.startswith("mmproj"):
            label = name if file.stem.lower() in name.lower() else f"{name}/{file.name}"
            yield _gguf(file, origin, label)


def _gguf(file: Path, origin: Origin, name: str) -> FoundModel:
    reason = ""
    try:
        if not is_gguf(file):
            reason = "not a GGUF file"
        else:
            check_convertible(file)
    except BadInput as error:
        reason = error.what
    return FoundModel(origin, "gguf", name, str(file), _size(file), not reason, reason)


def _ollama(root: Path) -> Iterator[FoundModel]:
    """Each manifest names the blob that is its GGUF."""
    manifests = root / "manifests"
    try:
        paths = sorted(path for path in manifests.rglob("*") if path.is_file())
    except OSError:
        return
    for path in paths:
        try:
            layers = json.loads(path.read_text(encoding="utf-8"))["layers"]
            digests = [layer["digest"] for layer in layers if layer.get("mediaType") == _OLLAMA_MODEL]
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
            continue
        parts = path.relative_to(manifests).parts
        name = "/".join(part for part in parts[1:-1] if part != "library") + ":" + parts[-1]
        for digest in digests:
            blob = root / "blobs" / str(digest).replace(":", "-")
            if blob.is_file():
                yield _gguf(blob, "ollama", name)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
