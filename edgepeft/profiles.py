"""Data files that describe things: one TOML file a thing, file name = id; a user's file overrides a shipped one by id.

A live probe always beats a profile: a GPU profile serves for cards that are not in this machine, and for what a driver
does not tell (memory bandwidth, tensor throughput).
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import msgspec

from edgepeft.errors import BadInput, UsageError
from edgepeft.paths import builtin_profiles, home
from edgepeft.units import MIB

_MEMORY_TOLERANCE = 0.08
"""Drivers differ by a few per cent in what they report; variants of one name differ by 20 % and more (10 or 12 GB)."""


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every file of every kind has."""

    id: str
    """The file's name without its ending."""


ProfileType = TypeVar("ProfileType", bound=Profile)


class GpuProfile(Profile, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A card as its vendor describes it; None where no trustworthy figure is known."""

    name: str
    """The name on the box."""
    nvml_names: tuple[str, ...]
    """Names that the driver gives the card."""
    architecture: str
    """Turing, Ampere, Ada Lovelace or Blackwell."""
    memory_mib: int
    """Memory in MiB as NVML reports it, else nominal; `sources` says which."""
    compute_capability: str
    """`8.9`: decides which kernels run."""
    bf16: bool
    """Whether the tensor cores multiply bfloat16 (compute capability 8.0 and later)."""
    desktop_reserve_mib: int
    """What a desktop, a browser and the driver usually hold; 0 for cards without a display output."""
    laptop: bool = False
    """A laptop chip: its power, and with it its speed, is set by the maker of the laptop."""
    memory_gb_per_s: float | None = None
    """Memory bandwidth, 10⁹ bytes a second."""
    tensor_tflops: float | None = None
    """Dense bf16 (before Ampere fp16) tensor throughput with float32 accumulation, 10¹² operations a second."""
    pcie_generation: int | None = None
    pcie_lanes: int | None = None
    board_power_w: float | None = None
    """Total board power as sold."""
    sources: dict[str, str]
    """Field → where its value comes from: a vendor's document with its address, or `estimated: …` with how."""

    @property
    def memory_bytes(self) -> int:
        """All memory of the card."""
        return self.memory_mib * MIB

    @property
    def desktop_reserve_bytes(self) -> int:
        """What plans leave to the desktop."""
        return self.desktop_reserve_mib * MIB

    @property
    def capability(self) -> tuple[int, int]:
        """`8.9` as (8, 9)."""
        major, _, minor = self.compute_capability.partition(".")
        return int(major), int(minor)


class NamedCard(Protocol):
    """What a live probe says of a card, as far as finding its profile needs it."""

    @property
    def name(self) -> str:
        """The driver's name for it."""
        ...

    @property
    def total_bytes(self) -> int | None:
        """All memory of the card; None when the driver does not say."""
        ...


def load_folder(kind: str, profile_type: type[ProfileType]) -> dict[str, ProfileType]:
    """Every profile of one kind by id: the shipped ones, overridden and extended by the user's own.

    Args:
        kind: the folder's name, such as `gpus`.
        profile_type: the struct that each file must match exactly.

    Raises:
        BadInput: a file cannot be read or is not TOML; a key is unknown, missing or wrong; id is not the file name.
    """
    profiles = {}
    for folder in (builtin_profiles() / kind, home().profiles / kind):
        for path in sorted(folder.glob("*.toml")) if folder.is_dir() else ():
            profile = load_profile(path, profile_type)
            profiles[profile.id] = profile
    return dict(sorted(profiles.items(), key=lambda item: _natural(item[0])))


def load_profile(path: Path, profile_type: type[ProfileType]) -> ProfileType:
    """One profile file.

    Raises:
        BadInput: as `load_folder`; the message names the file and the key.
    """
    try:
        profile = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), profile_type)
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise BadInput(f"is not UTF-8 text: {error}", where=str(path), hint="Save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"is not valid TOML: {error}", where=str(path)) from error
    except msgspec.ValidationError as error:
        known = ", ".join(field.name for field in msgspec.structs.fields(profile_type))
        raise BadInput(_say_key(str(error)), where=str(path), hint=f"Known keys: {known}") from error
    if profile.id != path.stem:
        raise BadInput(
            f"key `id` is {profile.id!r}, but the file is called {path.name}",
            where=str(path),
            hint=f'Write id = "{path.stem}", or rename the file',
        )
    return profile


def load_gpus() -> dict[str, GpuProfile]:
    """Every GPU profile by id.

    Raises:
        BadInput: as `load_folder`, or a capability, a memory size or a provenance that cannot be right.
    """
    profiles = load_folder("gpus", GpuProfile)
    for profile in profiles.values():
        _check_gpu(profile)
    return profiles


def find_gpu(gpu_id: str) -> GpuProfile:
    """The GPU profile of that id.

    Raises:
        UsageError: no such id; the nearest ones are named.
        BadInput: as `load_gpus`.
    """
    profiles = load_gpus()
    return profiles[known_id(gpu_id, profiles, what="GPU", where="--gpu", listing="edgepeft profiles list gpus")]


def known_id(wanted: str, known: Iterable[str], *, what: str, where: str, listing: str) -> str:
    """`wanted`, when it is among the known ids; capitals and spaces are forgiven.

    Raises:
        UsageError: it is not; the message names the nearest ids and the command that lists all.
    """
    ids = list(known)
    spelled = re.sub(r"[\s_]+", "-", wanted.strip().lower())
    if spelled in ids:
        return spelled
    near = [name for name in ids if name.startswith(spelled)] if spelled else []
    near += [name for name in difflib.get_close_matches(spelled, ids, n=4, cutoff=0.5) if name not in near]
    hint = f"Did you mean {' or '.join(near[:4])}? All: {listing}" if near else f"See {listing}"
    raise UsageError(f"unknown {what} {wanted!r}", where=where, hint=hint)


def match_gpu(card: NamedCard) -> GpuProfile | None:
    """The profile of a card that is in this machine: the driver's name, and of several sizes the nearest within 8 %."""
    named = [profile for profile in load_gpus().values() if card.name in profile.nvml_names]
    total = card.total_bytes
    if total is None:
        return named[0] if len(named) == 1 else None
    fitting = [
        profile for profile in named if abs(profile.memory_bytes - total) <= _MEMORY_TOLERANCE * profile.memory_bytes
    ]
    return min(fitting, key=lambda profile: abs(profile.memory_bytes - total), default=None)


def _check_gpu(profile: GpuProfile) -> None:
    where = f"profiles/gpus/{profile.id}.toml"
    if not re.fullmatch(r"\d+\.\d", profile.compute_capability):
        raise BadInput(f"key `compute_capability`: {profile.compute_capability!r} is not like 8.9", where=where)
    if profile.bf16 != (profile.capability >= (8, 0)):
        raise BadInput("key `bf16`: compute capability 8.0 and later have it, earlier ones do not", where=where)
    if profile.memory_mib <= profile.desktop_reserve_mib:
        raise BadInput("key `memory_mib`: not above `desktop_reserve_mib`", where=where)
    fields = {field.name for field in msgspec.structs.fields(GpuProfile)}
    unknown = sorted(set(profile.sources) - fields)
    if unknown:
        raise BadInput(f"key `sources.{unknown[0]}`: there is no such field", where=where)
    for name in fields - {"id", "sources"}:
        value = getattr(profile, name)
        counts = name == "compute_capability" or (isinstance(value, int | float) and not isinstance(value, bool))
        if counts and name not in profile.sources:
            raise BadInput(
                f"key `{name}`: has no entry under [sources]", where=where, hint="Say where the number comes from"
            )


def _say_key(message: str) -> str:
    """msgspec's `Expected … - at `$.a.b`` with the key in front."""
    reason, _, place = message.partition(" - at ")
    key = place.strip("`").removeprefix("$").removeprefix(".")
    return f"key `{key}`: {reason}" if key else reason


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text) if part]


ValueType = TypeVar("ValueType")


class PresetValue(msgspec.Struct, Generic[ValueType], frozen=True, forbid_unknown_fields=True):
    """One value of a preset, with the reason that plans show for it."""

    value: ValueType
    description: str
    """Why, in one line."""


class Preset(Profile, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a plan starts from when the user says only an intent."""

    title: str
    description: str
    """For whom it is, in one line."""
    whole_share: PresetValue[float]
    """Share of the samples that must stay whole when memory allows."""
    max_seq_len: PresetValue[int]
    """Tokens of a sample, for plans without data."""
    min_seq_len: PresetValue[int]
    """Tokens below which no plan goes to make a run fit."""
    precisions: PresetValue[tuple[str, ...]]
    """How the base may be held, best first."""
    ranks: PresetValue[tuple[int, ...]]
    """Ranks to try, best first."""
    targets: PresetValue[tuple[str, ...]]
    """Linear layers that get an update."""
    dropout: PresetValue[float]
    learning_rate: PresetValue[float]
    """Peak rate for a model whose residual stream is 4,096 wide."""
    weight_decay: PresetValue[float]
    warmup_fraction: PresetValue[float]
    """Share of the steps spent warming up."""
    schedule: PresetValue[str]
    """cosine, linear or constant."""
    samples_per_step: PresetValue[int]
    """Samples of one optimizer step at the most."""
    epochs: PresetValue[float]
    """Passes over data of usual size."""
    min_steps: PresetValue[int]
    """Optimizer steps below which small data gets more passes."""
    max_epochs: PresetValue[float]
    """Passes over small data at the most."""
    max_steps: PresetValue[int]
    """Optimizer steps at the most; 0 sets no limit."""
    evaluations: PresetValue[int]
    """Evaluations during the run, the last one included."""


def load_presets() -> dict[str, Preset]:
    """Every preset by id.

    Raises:
        BadInput: as `load_folder`.
    """
    return load_folder("presets", Preset)


def find_preset(preset_id: str) -> Preset:
    """The preset of that id.

    Raises:
        UsageError: no such id; the nearest ones are named.
        BadInput: as `load_presets`.
    """
    presets = load_presets()
    found = known_id(preset_id, presets, what="preset", where="--intent", listing="edgepeft profiles list presets")
    return presets[found]
