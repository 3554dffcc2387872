"""Copies of a base's decoder linears as they are held in memory: quantized once, stored in the model's folder.

`models/NAME/quantized/PRECISION/DEVICE.safetensors`; the engine writes it while it quantizes and reads it at every load
after that. Whatever it was made from and by stands in the file's own metadata, so that a copy and its description
cannot be parted. A card and the CPU each have their own: where a value lies midway between two codes they may round to
different ones, and a copy has the very bits of quantizing again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol, cast, get_args

import msgspec

from edgepeft.errors import BadInput
from edgepeft.models.headers import FileHeader, read_file_header
from edgepeft.models.quantized import StoredAs
from edgepeft.models.sizes import ABSMAX_BLOCK, NF4_BLOCK

CopyPrecision = Literal["nf4", "int8"]
"""Precisions that weights are quantized to."""
DeviceKind = Literal["cpu", "cuda"]

FORMAT = 1
"""Of the file; one of another format is made anew."""
METADATA_KEY = "edgepeft"
"""Under which the file's metadata holds the `CopySettings` as JSON."""
FOLDER = "quantized"

_QUANTIZED_HERE = frozenset({"fp32", "bf16", "fp16"})
"""Forms of a source that its linears are quantized from as they lie in its files. Data that was quantized elsewhere is
taken over as it is, or dequantized as a whole first."""


class Source(Protocol):
    """The part of a `ModelEntry`, or of a model that is described only, that says what is quantized."""

    @property
    def folder(self) -> str:
        """In the store; empty where nothing of the model is on this disk."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of its weight files."""
        ...

    @property
    def stored_as(self) -> StoredAs:
        """Form of its weights."""
        ...


class CopyUnusableError(Exception):
    """A stored copy must not be used; says why, as a clause."""


class CopySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What decides the bits of a copy; one whose settings differ in anything is made anew."""

    fingerprint: str
    """Of the source's weight files, as `ModelEntry` has it."""
    precision: CopyPrecision
    quant_type: str
    """`nf4`, or `absmax` for one scale a row."""
    device: DeviceKind
    """What it was quantized on."""
    block: int
    """Entries that share a scale; 0: those of a row."""
    absmax_block: int
    """Scales that share a second-level scale; 0: scales are float32."""
    double_quantization: bool
    format: int = FORMAT


class StoredCopy(msgspec.Struct, frozen=True):
    """A copy on this disk."""

    path: Path
    precision: CopyPrecision
    device: DeviceKind
    """What it was quantized on, and is used on."""
    size_bytes: int
    problem: str
    """Why it is not used and will be made anew; empty when it is used."""


def copy_settings(entry: Source, precision: str, device: DeviceKind) -> CopySettings | None:
    """The settings of the copy that a load in `precision` makes or uses; None where there is nothing to store."""
    if precision not in get_args(CopyPrecision) or entry.stored_as not in _QUANTIZED_HERE or not entry.folder:
        return None
    nf4 = precision == "nf4"
    return CopySettings(
        fingerprint=entry.fingerprint,
        precision=cast(CopyPrecision, precision),
        quant_type="nf4" if nf4 else "absmax",
        device=device,
        block=NF4_BLOCK if nf4 else 0,
        absmax_block=ABSMAX_BLOCK if nf4 else 0,
        double_quantization=nf4,
    )


def copy_path(entry: Source, settings: CopySettings) -> Path:
    """Where the copy of these settings lies, if it exists."""
    return Path(entry.folder) / FOLDER / settings.precision / f"{settings.device}.safetensors"


def read_copy_header(path: Path, settings: CopySettings) -> FileHeader | None:
    """The header of a stored copy that was made with exactly `settings`; None when there is no file.

    Raises:
        CopyUnusableError: it was made from or by something else, or is cut short or damaged.
    """
    if not path.is_file():
        return None
    try:
        header = read_file_header(path)
        found = msgspec.json.decode(header.metadata[METADATA_KEY], type=CopySettings)
        size = path.stat().st_size
    except BadInput as error:
        raise CopyUnusableError(error.what) from error
    except (KeyError, TypeError, msgspec.MsgspecError) as error:
        raise CopyUnusableError("it does not say what it was made from") from error
    except OSError as error:
        raise CopyUnusableError(f"it cannot be read: {error.strerror}") from error
    if found.fingerprint != settings.fingerprint:
        raise CopyUnusableError("it was made from other weights")
    differing = [name for name in settings.__struct_fields__ if getattr(found, name) != getattr(settings, name)]
    if differing:
        raise CopyUnusableError(f"it was made with another {' and '.join(differing)}")
    if size != header.data_end:
        raise CopyUnusableError(f"{size - header.data_end} bytes too many are at its end")
    return header


def find_copy(entry: Source, precision: str, device: DeviceKind) -> StoredCopy | None:
    """The copy that a load in `precision` would look for, judged by its header; None when there is none."""
    settings = copy_settings(entry, precision, device)
    if settings is None:
        return None
    path = copy_path(entry, settings)
    problem = ""
    try:
        if read_copy_header(path, settings) is None:
            return None
        size_bytes = path.stat().st_size
    except CopyUnusableError as error:
        problem, size_bytes = str(error), _size(path)
    except OSError:
        return None
    return StoredCopy(path, settings.precision, device, size_bytes, problem)


def list_copies(entry: Source) -> list[StoredCopy]:
    """All copies of a model that lie in its folder, judged by their headers."""
    found = [
        find_copy(entry, precision, device)
        for precision in get_args(CopyPrecision)
        for device in cast("tuple[DeviceKind, ...]", get_args(DeviceKind))
    ]
    return [copy for copy in found if copy is not None]


def usable_copy_bytes(entry: Source, precision: str, device: DeviceKind) -> int | None:
    """Size of the copy that a load in `precision` will read; None where it will quantize."""
    copy = find_copy(entry, precision, device)
    return copy.size_bytes if copy is not None and not copy.problem else None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
