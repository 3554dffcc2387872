"""What a person writes to mean a model: a store name, a folder, a GGUF file, a cache folder, or a name on a hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from edgepeft.errors import BadInput
from edgepeft.paths import as_name

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SPLIT_GGUF = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


def looks_like_path(reference: str) -> bool:
    """Whether `reference` is written as a path rather than as a name."""
    separators = [os.sep, os.altsep] if os.altsep else [os.sep]
    return any(separator in reference for separator in separators) or reference.startswith((".", "~"))


def model_folder(path: Path) -> Path:
    """The absolute folder or file that `path` means; a hub cache's `models--ORG--NAME` leads to its newest snapshot.

    Raises:
        BadInput: the cache folder holds no snapshot.
    """
    path = path.absolute()
    if path.is_dir() and (path / "snapshots").is_dir() and not (path / "config.json").exists():
        snapshot = newest_snapshot(path)
        if snapshot is None:
            raise BadInput(
                "this cache folder holds no downloaded model", where=str(path), hint="Download the model anew"
            )
        return snapshot
    # `folder/.` and `folder/../folder` are one source; links are kept, as caches are made of them.
    return Path(os.path.normpath(path))


def newest_snapshot(repository: Path) -> Path | None:
    """The snapshot that `refs/main` names, else the one changed last; None when there is none."""
    main = repository / "refs" / "main"
    if main.is_file():
        named = repository / "snapshots" / main.read_text(encoding="utf-8").strip()
        if named.is_dir():
            return named
    snapshots = [path for path in (repository / "snapshots").glob("*") if path.is_dir()]
    return max(snapshots, key=lambda path: path.stat().st_mtime, default=None)


def huggingface_cache() -> Path:
    """The folder of downloaded repositories: HF_HUB_CACHE, else under HF_HOME, else in the user's cache."""
    if named := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(named).expanduser()
    if named := os.environ.get("HF_HOME"):
        return Path(named).expanduser() / "hub"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "huggingface" / "hub"


def cached_repository(reference: str) -> Path | None:
    """The folder of `ORG/NAME` in Hugging Face's cache, when a snapshot of it is there."""
    if not _HUB_NAME.fullmatch(reference):
        return None
    repository = huggingface_cache() / ("models--" + reference.replace("/", "--"))
    return repository if newest_snapshot(repository) is not None else None


def default_name(source: Path) -> str:
    """The store name that a model folder or file gets when nobody chooses one."""
    if source.is_file():
        return as_name(source.stem)
    repository = source.parent.parent
    if source.parent.name == "snapshots" and repository.name.startswith("models--"):
        return as_name(repository.name.split("--")[-1])
    return as_name(source.name)


def is_gguf(path: Path) -> bool:
    """Whether the file begins as a GGUF does; its name does not matter (Ollama's have no ending).

    Raises:
        BadInput: it cannot be read, or is one part of a split file.
    """
    split = _SPLIT_GGUF.search(path.name)
    if split is not None and int(split.group(1)) > 1:
        raise BadInput(
            "this is one part of a split GGUF",
            where=str(path),
            hint="Join the parts first with llama-gguf-split --merge",
        )
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError as error:
        raise BadInput(
            f"cannot be read: {error.strerror}", where=str(path), hint="Check the path and its permissions"
        ) from error


def gguf_in(folder: Path) -> Path | None:
    """The GGUF in a folder that has no config.json; None when the folder is to be read as safetensors.

    Raises:
        BadInput: there are several to choose from.
    """
    if (folder / "config.json").is_file():
        return None
    files = sorted(path for path in folder.glob("*.gguf") if not path.name.startswith("mmproj"))
    if len(files) > 1:
        names = ", ".join(path.name for path in files[:4])
        raise BadInput(f"several GGUF files are here: {names}", where=str(folder), hint="Name one of them")
    return files[0] if files else None


class NotOnDisk(BadInput):
    """A model that is nowhere on this disk."""


def how_to_bring(hub_name: str) -> str:
    """The commands that bring a model from the hub to this machine, as a sentence without a full stop."""
    name = hub_name.split("/")[-1]
    return (
        f"On a machine with a network run: hf download {hub_name} --local-dir {name}"
        f" ; bring the folder here and run: edgepeft models add {name}"
    )


def not_on_disk(reference: str, known: Sequence[str]) -> NotOnDisk:
    """The error for a model that is nowhere on this disk: how to get it here, or which names there are."""
    from edgepeft.models.described import described_model

    profile = described_model(reference)
    hub_name = reference if _HUB_NAME.fullmatch(reference) else profile.aliases[0] if profile is not None else None
    if hub_name is not None:
        return NotOnDisk(
            "this model is not on this disk, and edgepeft never downloads",
            where=reference,
            hint=how_to_bring(hub_name),
        )
    if looks_like_path(reference) or reference.endswith(".gguf"):
        return NotOnDisk(
            "there is no such file or folder",
            where=reference,
            hint="Check the path; edgepeft models scan finds models on this disk",
        )
    names = ", ".join(dict.fromkeys((*known, "smollm2-135m")))
    return NotOnDisk(
        f"no model is called {reference!r}",
        where="model",
        hint=f"Known: {names}. Add one with: edgepeft models add DIR, or find some with: edgepeft models scan",
    )
