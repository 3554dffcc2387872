"""Which tensor libraries are installed, and for which devices they were built, without importing them."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import platform
import re
from pathlib import Path

import msgspec


class Packages(msgspec.Struct, frozen=True):
    """The software that a run needs; None where it is not installed or not said."""

    python: str
    torch: str | None = None
    """Version, such as 2.13.0+cu130; wheels of PyPI carry no suffix."""
    torch_cuda: str | None = None
    """CUDA that torch was built for; None in a wheel for CPUs or AMD cards."""
    torch_hip: str | None = None
    """ROCm's HIP that torch was built for."""
    transformers: str | None = None
    bitsandbytes: str | None = None
    bitsandbytes_cuda: tuple[tuple[int, int], ...] = ()
    """CUDA versions that the installed bitsandbytes holds a library for."""


def read_packages() -> Packages:
    """What is installed in this Python; reads files, imports nothing."""
    torch = _read_torch(_folder("torch"))
    return Packages(
        python=platform.python_version(),
        torch=torch.get("__version__"),
        torch_cuda=torch.get("cuda"),
        torch_hip=torch.get("hip"),
        transformers=_version("transformers"),
        bitsandbytes=_version("bitsandbytes"),
        bitsandbytes_cuda=cuda_libraries(_folder("bitsandbytes")),
    )


def _read_torch(folder: Path | None) -> dict[str, str]:
    if folder is None:
        return {}
    try:
        return read_assignments((folder / "version.py").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}


def read_assignments(source: str) -> dict[str, str]:
    """Module-level assignments of string literals in Python source, without running it; others are left out."""
    try:
        module = ast.parse(source)
    except SyntaxError:
        return {}
    found = {}
    for statement in module.body:
        if isinstance(statement, ast.Assign):
            target = statement.targets[0]
        elif isinstance(statement, ast.AnnAssign):
            target = statement.target
        else:
            continue
        value = statement.value
        if isinstance(target, ast.Name) and isinstance(value, ast.Constant) and isinstance(value.value, str):
            found[target.id] = value.value
    return found


def cuda_libraries(folder: Path | None) -> tuple[tuple[int, int], ...]:
    """CUDA versions of the native libraries in an installed bitsandbytes: `libbitsandbytes_cuda128.so` is (12, 8)."""
    if folder is None:
        return ()
    versions = set()
    for file in folder.glob("libbitsandbytes_cuda*"):
        match = re.match(r"libbitsandbytes_cuda(\d\d)(\d+)", file.name)
        if match is not None:
            versions.add((int(match.group(1)), int(match.group(2))))
    return tuple(sorted(versions))


def _folder(package: str) -> Path | None:
    try:
        # For a name without a dot this looks for files and imports nothing.
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
