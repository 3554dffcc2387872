"""Writing a base's quantized linears into their stored copy while it is loaded; see `models.quantized_copy`."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from types import TracebackType

import msgspec
import torch

from edgepeft import __version__
from edgepeft.engine.model.copy_layout import (
    MAP,
    Shapes,
    checksum,
    parts_of,
    settings_for,
    tensors_of,
    tensors_of_all,
)
from edgepeft.engine.model.frozen import FrozenWeight, Workspace
from edgepeft.engine.model.safetensors_stream import SafetensorsStream
from edgepeft.errors import DiskProblem, EdgepeftError
from edgepeft.models.quantized_copy import METADATA_KEY, CopySettings, copy_path
from edgepeft.models.store import ModelEntry, verify_unchanged
from edgepeft.paths import atomic_path, disk_errors
from edgepeft.spec import Precision
from edgepeft.units import GIB, format_bytes

Warn = Callable[[str], None]

_SPARE_BYTES = GIB
"""Left free on the store's disk: a copy saves time, and what a run writes must not fail for it."""
_ABANDONED_SECONDS = 3600
"""A temporary file that nobody wrote to for so long is the rest of a process that was killed."""


def start_copy(
    entry: ModelEntry, precision: Precision, shapes: Shapes, workspace: Workspace, warn: Warn
) -> CopyWriter | None:
    """What writes the copy that this load makes; None where nothing is quantized here."""
    settings = settings_for(entry, precision, workspace)
    return None if settings is None else CopyWriter(entry, settings, shapes, workspace, warn)


class CopyWriter:
    """Writes a copy matrix by matrix; trouble with the disk ends the writing with a word, never the load.

    Nothing is at the copy's place until `finish`: then it is complete, fsynced and renamed. Of two processes that write
    the same copy the later one's stays.

    Args:
        entry: the model.
        settings: of the copy.
        shapes: of its linears.
        workspace: shared by all linears.
        warn: told why there is no copy.
    """

    def __init__(
        self, entry: ModelEntry, settings: CopySettings, shapes: Shapes, workspace: Workspace, warn: Warn
    ) -> None:
        self._entry, self._settings, self._workspace, self._warn = entry, settings, workspace, warn
        self._path = copy_path(entry, settings)
        self._tensors = tensors_of_all(settings.precision, shapes)
        self._contexts = contextlib.ExitStack()
        self._stream: SafetensorsStream | None = None

    def __enter__(self) -> CopyWriter:
        with self._told():
            verify_unchanged(self._entry)
            with disk_errors(self._path):
                # Not the model's own folder: one that was removed meanwhile must not come back.
                for folder in (self._path.parent.parent, self._path.parent):
                    folder.mkdir(exist_ok=True)
                self._remove_abandoned()
                self._check_space()
            temporary = self._contexts.enter_context(atomic_path(self._path))
            self._stream = self._contexts.enter_context(
                SafetensorsStream(
                    temporary,
                    {name: shape for name, (_, shape) in self._tensors.items()},
                    {name: dtype for name, (dtype, _) in self._tensors.items()},
                    {
                        METADATA_KEY: msgspec.json.encode(self._settings).decode(),
                        "made_by": f"edgepeft {__version__}, bitsandbytes {metadata.version('bitsandbytes')}",
                    },
                )
            )
            if self._settings.precision == "nf4":
                self._stream.write(MAP, self._workspace.dynamic_map.cpu())
        return self

    def write(self, path: str, weight: FrozenWeight) -> None:
        """Adds the frozen weight of the linear at `path`."""
        if self._stream is None:
            return
        with self._told():
            parts = [part.cpu() for part in parts_of(weight)]
            parts.append(torch.frombuffer(bytearray(checksum(parts)), dtype=torch.uint8))
            for name, part in zip(tensors_of(self._settings.precision, path, weight.shape), parts, strict=True):
                self._stream.write(name, part)

    def finish(self) -> None:
        """Puts the complete file at its place, if its source is still what it was made from."""
        if self._stream is None:
            return
        with self._told():
            verify_unchanged(self._entry)
            self._stream = None
            self._contexts.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._abandon()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Ends the writing with a word where the disk does not take it; a full memory is not the disk's trouble."""
        try:
            yield
        except (OSError, EdgepeftError) as error:
            self._abandon()
            why = error.what if isinstance(error, EdgepeftError) else error.strerror or str(error)
            self._warn(
                f"the {self._settings.precision} copy of {self._entry.name} is not stored, so the next load quantizes "
                f"again: {why} ({self._path.parent})"
            )
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        self._stream = None
        reason = _AbandonedError()
        # The temporary file goes, whatever its disk still says.
        with contextlib.suppress(_AbandonedError, OSError, EdgepeftError):
            self._contexts.__exit__(_AbandonedError, reason, None)

    def _remove_abandoned(self) -> None:
        for leftover in self._path.parent.glob(f".{self._path.name}.*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - leftover.stat().st_mtime > _ABANDONED_SECONDS:
                    leftover.unlink()

    def _check_space(self) -> None:
        needed = sum(math.prod(shape) * dtype.itemsize for dtype, shape in self._tensors.values())
        free = shutil.disk_usage(self._path.parent).free
        if free < needed + _SPARE_BYTES:
            raise DiskProblem(
                f"it needs {format_bytes(needed)} beside {format_bytes(_SPARE_BYTES)} that stay free, and "
                f"{format_bytes(free)} are free"
            )


class _AbandonedError(Exception):
    """Ends the contexts of a copy that will not be."""
