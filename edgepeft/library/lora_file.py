"""A LoRA in a file of its own, without PEFT's config: pairs of A and B in safetensors, or a GGUF.

Such a file says neither its base nor, often, its alpha. What is told here comes from names and headers; the tensors are
the engine's, which `library.import_client` starts.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import msgspec

from edgepeft.errors import BadInput
from edgepeft.library.store import CONFIG_FILE, WEIGHTS_FILE
from edgepeft.models.headers import INDEX_NAME

FileFormat = Literal["safetensors", "gguf"]
_ENDINGS: dict[str, FileFormat] = {".safetensors": "safetensors", ".gguf": "gguf"}
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class LoraFile(msgspec.Struct, frozen=True):
    """A file that is to be imported."""

    path: str
    """Absolute path."""
    format: FileFormat
    scale: float | None = None
    """What B · A is multiplied with, as mlx-lm's config beside it says; None where there is none."""


class ImportRequest(msgspec.Struct, frozen=True, tag="import"):
    """A LoRA file to be written as PEFT's tensors."""

    base: str
    """Name in the model store."""
    file: LoraFile
    alpha: float | None
    """As the user says it; None for the file's own."""
    weights_file: str
    """To be written."""


class Imported(msgspec.Struct, frozen=True, tag="imported"):
    """The tensors are written."""

    ranks: dict[str, int]
    """Module path in the base → rank."""
    alphas: dict[str, float]
    """Module path in the base → alpha; the update is scaled by alpha / rank."""
    targets: list[str]
    """PEFT's target_modules."""
    alpha_from: str
    """Where alpha was taken from, as a clause."""
    versions: dict[str, str]
    """Package → version."""
    notes: tuple[str, ...] = ()
    """What a person should know, as clauses."""


def find_lora_file(path: Path) -> LoraFile | None:
    """The file that `path` means: itself, or the only one in its folder; None for an adapter in PEFT's format.

    Raises:
        BadInput: there is nothing of the kind, more than one, or something that is never read.
    """
    place = path.expanduser().absolute()
    folder = place if place.is_dir() else place.parent
    if not place.exists():
        raise BadInput("there is no such file or folder", where=str(path), hint="Check the path")
    settings = _settings(folder / CONFIG_FILE) if place.is_dir() or place.suffix == ".safetensors" else None
    if isinstance((settings or {}).get("peft_type"), str) and (place.is_dir() or place.name == WEIGHTS_FILE):
        return None
    if place.is_dir():
        found = sorted(file for file in place.iterdir() if file.is_file() and file.suffix in _ENDINGS)
        if settings is not None and (folder / "adapters.safetensors").is_file():
            # mlx-lm keeps the adapters of earlier steps beside the last.
            found = [folder / "adapters.safetensors"]
        if (folder / INDEX_NAME).is_file() or ((folder / "config.json").is_file() and settings is None):
            raise BadInput("is a whole model, not a LoRA", where=str(path), hint=f"Use: edgepeft models add {path}")
        if not found and settings is None and (folder / "adapter_model.bin").is_file():
            raise BadInput(
                "holds pickled weights, which can run code and are never read",
                where=str(folder / "adapter_model.bin"),
                hint="Save it again as safetensors where it was made",
            )
        if len(found) != 1:
            what = "holds several LoRA files" if found else f"has no {CONFIG_FILE}, and no .safetensors or .gguf file"
            hint = f"Name one, such as {found[0]}" if found else "Give the folder or the file of an adapter"
            raise BadInput(what, where=str(path), hint=hint)
        place = found[0]
    kind = _ENDINGS.get(place.suffix)
    if kind is None:
        pickled = place.suffix in _PICKLED
        what = "is of a kind that can run code and is never read" if pickled else "is no .safetensors and no .gguf file"
        raise BadInput(what, where=str(path), hint="Save the LoRA as safetensors where it was made")
    return LoraFile(str(place), kind, _mlx_scale(settings, folder / CONFIG_FILE) if settings is not None else None)


def _settings(path: Path) -> dict[str, Any] | None:
    """The adapter_config.json of a folder; None where there is none."""
    try:
        settings = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot be read: {error}", where=str(path), hint="Copy it again from its source") from error
    if not isinstance(settings, dict):
        raise BadInput("is no JSON object", where=str(path), hint="Copy it again from its source")
    return settings


def _mlx_scale(settings: dict[str, Any], path: Path) -> float | None:
    """What mlx-lm multiplies B · A with; None where its config leaves that open.

    Raises:
        BadInput: the config is of something else than plain LoRA.
    """
    kind = settings.get("fine_tune_type", "lora")
    if kind != "lora":
        raise BadInput(
            f"is of a fine-tune of the type {kind}, and only plain LoRA can be imported",
            where=str(path),
            hint="Train it as LoRA, or fuse it into its model and add that",
        )
    parameters = settings.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    # Earlier versions multiplied `scale` by an `alpha` / rank beside it, later ones ignore that.
    if not isinstance(parameters, dict) or "alpha" in parameters or isinstance(scale, bool):
        return None
    return float(scale) if isinstance(scale, int | float) and math.isfinite(scale) and scale > 0 else None
