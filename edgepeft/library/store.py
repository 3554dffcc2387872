"""The adapter library: `adapters/NAME/vK`, each version complete and never changed once it is there.

A version is made beside its final place and renamed into it, so a reader sees all of it or nothing. Version
numbers are never used twice, also not after a removal: `audit.jsonl` beside the versions remembers them.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgepeft.errors import BadInput, EdgepeftError, UsageError
from edgepeft.library.audit import read_audit, write_audit
from edgepeft.library.card import CARD_FILE, Card
from edgepeft.library.peft_config import OWN_PREFIX, check_supported
from edgepeft.library.tensors import dimensions_differ, shape_mismatch
from edgepeft.models.headers import read_header
from edgepeft.paths import check_name, disk_errors, home, make_folder, sync_folder, write_atomic

if TYPE_CHECKING:
    from edgepeft.models.store import ModelEntry

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_VERSION = re.compile(r"v([1-9]\d{0,8})")
_REFERENCE = re.compile(r"([a-z0-9][a-z0-9._-]{0,63})(?:@v?([1-9]\d{0,8}))?")


class AdapterFolder(msgspec.Struct, frozen=True):
    """One adapter on disk."""

    path: Path
    """Absolute folder with adapter_config.json and adapter_model.safetensors."""
    name: str | None
    """Name in the library; None for a folder elsewhere."""
    version: int | None
    card: Card | None
    """None for adapters that PEFT or another tool wrote."""
    config: dict[str, Any]
    """adapter_config.json as it stands."""

    @property
    def reference(self) -> str:
        """`NAME@vK`, or the path of a folder outside the library."""
        return f"{self.name}@v{self.version}" if self.name else str(self.path)

    @property
    def method(self) -> str:
        """Which method it is of, and its rank where it has one, in a few letters such as `lora r16`."""
        kind = str(self.config["peft_type"]).removeprefix(OWN_PREFIX).lower()
        rank = self.config.get("r")
        return f"{kind} r{rank}" if isinstance(rank, int) else kind

    @property
    def weights(self) -> Path:
        """The safetensors file."""
        return self.path / WEIGHTS_FILE


class BrokenVersion(msgspec.Struct, frozen=True):
    """A version folder that cannot be used."""

    path: Path
    why: str


def resolve_adapter(reference: str) -> AdapterFolder:
    """The adapter that `NAME` (its newest version), `NAME@v2` or a folder path means.

    Raises:
        BadInput: there is no such adapter, or its folder is not complete.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is not None:
        name, wanted = match.groups()
        versions = versions_of(name)
        if versions:
            version = int(wanted) if wanted else versions[-1]
            if version not in versions:
                has = ", ".join(f"v{number}" for number in versions)
                raise BadInput(f"adapter {name!r} has no v{version}", where=reference, hint=f"It has {has}")
            return open_adapter(home().adapters / name / f"v{version}", name, version)
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return _open_outside(folder)
    if folder.is_file():
        raise BadInput(
            "is a file, and an adapter is a name or a folder",
            where=reference,
            hint=f"Import it first: {_import_command(folder)}",
        )
    names = sorted({adapter.name for adapter in list_adapters() if adapter.name})
    known = f"Known: {', '.join(names)}; or give a folder" if names else "The library is empty; give a folder"
    raise BadInput(f"no adapter is called {reference!r}", where="adapter", hint=known)


def find_newest(name: str) -> AdapterFolder | None:
    """The newest usable version of a name; None where there is none."""
    for version in reversed(versions_of(name)):
        try:
            return open_adapter(home().adapters / name / f"v{version}", name, version)
        except BadInput:
            continue
    return None


def split_reference(text: str, mark: str) -> tuple[str, str | None]:
    """An adapter's reference, and what stands behind the last `mark`; None where nothing does.

    A path may hold the mark itself.
    """
    reference, found, rest = text.rpartition(mark)
    if not found or Path(text).expanduser().is_dir():
        return text, None
    return reference, rest


def open_adapter(folder: Path, name: str | None = None, version: int | None = None) -> AdapterFolder:
    """Reads and checks the files of an adapter folder; the tensors themselves are not read.

    Raises:
        BadInput: a file is missing or damaged, or the weights are pickled.
    """
    config_file = folder / CONFIG_FILE
    try:
        config = msgspec.json.decode(config_file.read_bytes())
    except FileNotFoundError:
        raise BadInput(
            f"has no {CONFIG_FILE}",
            where=str(folder),
            hint="Give the folder that PEFT or edgepeft saved the adapter into"
            + (f", or import it first: {_import_command(folder)}" if any(folder.glob("*.safetensors")) else ""),
        ) from None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadInput(
            f"cannot be read: {error}", where=str(config_file), hint="Copy it again from its source"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise BadInput(
            "does not name a peft_type",
            where=str(config_file),
            hint=f"Give a folder that PEFT saved, or import it first: {_import_command(folder)}",
        )
    if not (folder / WEIGHTS_FILE).is_file():
        if (folder / "adapter_model.bin").exists():
            raise BadInput(
                "holds pickled weights, which can run code and are never read",
                where=str(folder / "adapter_model.bin"),
                hint="Save it again as safetensors where it was made",
            )
        raise BadInput(f"has no {WEIGHTS_FILE}", where=str(folder), hint="Copy the whole folder again from its source")
    read_header(folder / WEIGHTS_FILE)
    return AdapterFolder(folder.absolute(), name, version, read_card(folder), config)


def read_card(folder: Path) -> Card | None:
    """The card of an adapter folder; None when it has none.

    Raises:
        BadInput: the card is damaged.
    """
    path = folder / CARD_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Card)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, EdgepeftError) as error:
        raise BadInput(
            f"is not a readable card: {error}",
            where=str(path),
            hint="Remove it to use the adapter as a plain PEFT folder",
        ) from error


def write_card(folder: Path, card: Card) -> None:
    """Writes `card.json` into an adapter folder."""
    write_atomic(folder / CARD_FILE, msgspec.json.format(msgspec.json.encode(card), indent=2) + b"\n")


def list_adapters() -> list[AdapterFolder]:
    """Every usable version in the library, by name and version."""
    return scan_library()[0]


def scan_library() -> tuple[list[AdapterFolder], list[BrokenVersion]]:
    """Every version in the library: the usable ones, and the broken ones with the reason."""
    usable: list[AdapterFolder] = []
    broken: list[BrokenVersion] = []
    for name in library_names():
        try:
            versions = versions_of(name)
        except OSError as error:
            broken.append(BrokenVersion(home().adapters / name, f"cannot be read: {error.strerror or error}"))
            continue
        for version in versions:
            folder = home().adapters / name / f"v{version}"
            try:
                usable.append(open_adapter(folder, name, version))
            except BadInput as error:
                broken.append(BrokenVersion(folder, str(error)))
    return usable, broken


def library_names() -> list[str]:
    """The folders of the library by their names; one may hold no usable version, or none at all."""
    root = home().adapters
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir()) if root.is_dir() else []


def next_version(name: str) -> int:
    """The number that the next version of `name` gets; numbers of removed versions are not used again."""
    used = [*versions_of(name), *(entry.version for entry in read_audit(name))]
    return max(used, default=0) + 1


def publish(folder: Path, name: str, card: Card) -> str:
    """Copies a finished adapter into the library as its next version; `folder` stays as it is.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        name: library name.
        card: its name and version are set here.

    Returns:
        `NAME@vK`.

    Raises:
        UsageError: `name` cannot be a name.
        BadInput: the folder is not a complete adapter, or `name` is known over another base.
        DiskProblem: the disk is full, or may not be written.
    """
    check_name(name)
    check_same_base(name, card.base_fingerprint)
    if card.combined is not None:
        return _add(open_adapter(folder), name, card, card.combined.command, card.combined.formula)
    if card.imported is not None:
        return _add(open_adapter(folder), name, card, "imported", card.imported.path)
    return _add(open_adapter(folder), name, card, "published", card.run)


def import_adapter(folder: Path, name: str) -> str:
    """Copies a PEFT folder into the library as the next version of `name`; a card in it is kept.

    Returns:
        `NAME@vK`.

    Raises:
        UsageError: `name` cannot be a name.
        BadInput: the folder is not a complete adapter, or belongs to another base than `name`.
        DiskProblem: the disk is full, or may not be written.
    """
    check_name(name)
    adapter = open_adapter(folder)
    versions = versions_of(name)
    if adapter.card is not None:
        check_same_base(name, adapter.card.base_fingerprint)
    if versions:
        newest = home().adapters / name / f"v{versions[-1]}" / WEIGHTS_FILE
        if dimensions_differ(read_header(newest), read_header(adapter.weights)):
            raise BadInput(
                f"its tensors have other sizes than those of {name}@v{versions[-1]}: it has another base",
                where=str(folder),
                hint="Choose another --name",
            )
    return _add(adapter, name, adapter.card, "imported", str(adapter.path))


def check_same_base(name: str, base_fingerprint: str) -> None:
    """Refuses a base other than the one that the versions of `name` were trained on.

    Args:
        name: in the library, or not yet.
        base_fingerprint: empty where the base is not known; then nothing is refused.

    Raises:
        BadInput: they were trained on another base.
    """
    for version in reversed(versions_of(name)):
        card = read_card(home().adapters / name / f"v{version}")
        if card is not None and base_fingerprint and card.base_fingerprint not in ("", base_fingerprint):
            raise BadInput(
                f"adapter {name!r} exists and was trained on another base, {card.base}",
                where="--name",
                hint="Choose another name for an adapter over this base",
            )


def rollback(reference: str, version: str | None = None) -> tuple[str, int]:
    """Publishes an older version once more as the newest, so that NAME means it again; nothing is lost.

    Args:
        reference: `NAME`, or `NAME@v1` with the version.
        version: `v1` or `1`; None for the one before the newest.

    Returns:
        The new `NAME@vK`, and the number of the version that it is a copy of.

    Raises:
        UsageError: no version can be meant, or two are named.
        BadInput: there is no such adapter or version, it is broken, or it is the newest already.
        DiskProblem: the disk is full, or may not be written.
    """
    match = _REFERENCE.fullmatch(reference)
    name, wanted = match.groups() if match else ("", None)
    versions = versions_of(name) if name else []
    if not versions:
        raise BadInput(f"no adapter in the library is called {reference!r}", hint="See: edgepeft adapters list")
    if version is not None:
        said = _VERSION.fullmatch(f"v{version.removeprefix('v')}")
        if wanted is not None or said is None:
            what = f"{version!r} is no version" if said is None else f"two versions are named, v{wanted} and {version}"
            raise UsageError(what, where="VERSION", hint=f"Write for example: adapters rollback {name} v{versions[0]}")
        wanted = said.group(1)
    has = ", ".join(f"v{number}" for number in versions)
    if wanted is None and len(versions) == 1:
        raise BadInput(f"adapter {name!r} has {has} only", where=reference, hint="There is nothing to go back to")
    number = versions[-2] if wanted is None else int(wanted)
    if number not in versions:
        raise BadInput(f"adapter {name!r} has no v{number}", where=reference, hint=f"It has {has}")
    if number == versions[-1]:
        raise BadInput(f"v{number} is the newest version of {name!r} already", where=reference, hint=f"It has {has}")
    old = open_adapter(home().adapters / name / f"v{number}", name, number)
    return _add(old, name, old.card, "rolled back", f"to v{number}"), number


def removable(reference: str) -> tuple[str, int | None, list[str]]:
    """What `NAME` or `NAME@v2` would remove: name, version (None for all), and the references that go.

    Raises:
        BadInput: there is no such adapter in the library.
    """
    match = _REFERENCE.fullmatch(reference)
    name, wanted = match.groups() if match else ("", None)
    version = int(wanted) if wanted else None
    doomed = [number for number in versions_of(name) if version in (None, number)] if name else []
    if not doomed:
        raise BadInput(f"no adapter in the library is called {reference!r}", hint="See: edgepeft adapters list")
    return name, version, [f"{name}@v{number}" for number in doomed]


def remove(name: str, version: int | None = None) -> list[str]:
    """Removes one version, or all of them; the audit stays. Returns the references that are gone.

    Raises:
        BadInput: there is no such adapter.
        DiskProblem: a file may not be deleted.
    """
    removable(f"{name}@v{version}" if version else name)
    chosen = [number for number in versions_of(name) if version in (None, number)]
    folder = home().adapters / name
    for number in chosen:
        doomed = folder / f".v{number}.removed"
        with disk_errors(folder):
            # After the rename no reader finds a half-deleted version.
            shutil.rmtree(doomed, ignore_errors=True)
            (folder / f"v{number}").rename(doomed)
            write_audit(name, "removed", number)
            shutil.rmtree(doomed)
    return [f"{name}@v{number}" for number in chosen]


def check_base(adapter: AdapterFolder, entry: ModelEntry) -> list[str]:
    """Whether the adapter belongs to this base; returns warnings.

    A card's fingerprint decides. Without one, every LoRA tensor must have the dimensions of the base's linears,
    and the caller is warned that this proves only the shape; tensors of other methods are checked as they are loaded.

    Raises:
        BadInput: it was trained on another base, or is of a kind that is not known here.
    """
    if adapter.card is not None and adapter.card.base_fingerprint:
        if adapter.card.base_fingerprint == entry.fingerprint:
            return []
        raise BadInput(
            f"was trained on {adapter.card.base} ({_short(adapter.card.base_fingerprint)}), "
            f"not on {entry.name} ({_short(entry.fingerprint)})",
            where=adapter.reference,
            hint=f"Use it with {adapter.card.base}",
        )
    check_supported(adapter.config, str(adapter.path / CONFIG_FILE))
    mismatch = shape_mismatch(read_header(adapter.weights), adapter.config, entry.shape)
    claimed = adapter.config.get("base_model_name_or_path") or "a base that it does not name"
    if mismatch:
        raise BadInput(
            f"does not fit {entry.name}: {mismatch}",
            where=adapter.reference,
            hint=f"Its config says it was trained on {claimed}",
        )
    lacks = "no card" if adapter.card is None else "a card without its base"
    return [
        f"{adapter.reference} has {lacks}: its tensors have the sizes of {entry.name}, "
        f"but that it was trained on these weights is unverified (its config says {claimed})"
    ]


def weights_digest(adapter: AdapterFolder) -> str:
    """`sha256:…` of an adapter's weights file."""
    with disk_errors(adapter.weights), adapter.weights.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def copy_adapter(adapter: AdapterFolder, folder: Path) -> None:
    """Copies an adapter's config and weights into `folder`, made if it is not there, and waits until they are on disk.

    Raises:
        DiskProblem: no space, or no permission.
    """
    make_folder(folder)
    with disk_errors(folder):
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copyfile(adapter.path / file, folder / file)
            with (folder / file).open("rb+") as written:
                os.fsync(written.fileno())


def _add(adapter: AdapterFolder, name: str, card: Card | None, action: str, detail: str) -> str:
    parent = home().adapters / name
    make_folder(parent)
    with disk_errors(parent):
        building = Path(tempfile.mkdtemp(dir=parent, prefix=".new-"))
        try:
            copy_adapter(adapter, building)
            # mkdtemp makes a private folder; a library may be shared.
            building.chmod(0o755)
            version = next_version(name)
            while True:
                if card is not None:
                    write_card(building, msgspec.structs.replace(card, name=name, version=version))
                target = parent / f"v{version}"
                try:
                    building.rename(target)
                    break
                except OSError:
                    # Another process published this number in between.
                    if not target.exists():
                        raise
                    version += 1
            sync_folder(parent)
            write_audit(name, action, version, detail)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return f"{name}@v{version}"


def versions_of(name: str) -> list[int]:
    """The versions of `name` that are there, oldest first; a folder is all that makes one."""
    folder = home().adapters / name
    if not folder.is_dir():
        return []
    matches = (_VERSION.fullmatch(entry.name) for entry in folder.iterdir() if entry.is_dir())
    return sorted(int(match.group(1)) for match in matches if match)


def _open_outside(folder: Path) -> AdapterFolder:
    """A folder given by path; one inside the library keeps its name."""
    path = folder.absolute()
    version = _VERSION.fullmatch(path.name)
    if version and path.parent.parent == home().adapters:
        return open_adapter(path, path.parent.name, int(version.group(1)))
    return open_adapter(path)


def _import_command(path: Path) -> str:
    return f"edgepeft adapters import {path} --name NAME --base MODEL"


def _short(fingerprint: str) -> str:
    kind, _, digest = fingerprint.partition(":")
    return f"{kind}:{digest[:12]}" if digest else fingerprint[:12]
