"""A model folder as one downloads it: what it must hold, and what of it the store keeps."""

from __future__ import annotations

import filecmp
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec

from edgepeft.errors import BadInput
from edgepeft.models.config import is_vision_language, language_config, read_shape
from edgepeft.models.conversion import convert
from edgepeft.models.families import FAMILIES
from edgepeft.models.generic import shape_from_headers
from edgepeft.models.headers import TensorHeader, read_headers, weight_files
from edgepeft.models.licence import read_licence
from edgepeft.models.quantized import StoredAs, stored_form
from edgepeft.models.shape import ModelShape
from edgepeft.processes import Progress

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_SLOW_TOKENIZERS = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")


class FolderContents(msgspec.Struct, frozen=True):
    """A folder that was checked and can be used as a base."""

    path: Path
    """The folder, absolute."""
    files: tuple[Path, ...]
    """Its safetensors files."""
    shape: ModelShape
    """Of its language model."""
    stored_as: StoredAs
    """Form of its weights."""
    weights_bytes: int
    """Size of its files."""
    licence: str | None
    """As the folder says it."""
    notes: tuple[str, ...]
    """What the user should know."""
    slow_tokenizer: bool
    """Whether its tokenizer has to be converted first."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder.

    Raises:
        BadInput: the file is missing, unreadable, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"no {path.name} is in this folder", where=str(path.parent), hint=_WHOLE) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInput(
            f"not readable as JSON: {error}", where=str(path), hint="Copy or download this file anew"
        ) from error
    if not isinstance(content, dict):
        raise BadInput("not a JSON object", where=str(path), hint="Copy or download this file anew")
    return content


def inspect_folder(folder: Path) -> FolderContents:
    """Checks everything that can be checked without reading a weight.

    Raises:
        BadInput: config, tokenizer or weights are missing, cut short, of an unknown kind, or do not belong together.
    """
    config = read_json(folder / "config.json")
    files = weight_files(folder)
    tensors = read_headers(files)
    stored_as = stored_form(config, tensors.values(), where=str(folder))
    shape = folder_shape(config, tensors)
    notes = []
    if is_vision_language(config):
        notes.append("vision-language model: only its language tower is used")
    elif stored_as in ("fp32", "bf16", "fp16"):
        _check_weights_belong(shape, tensors, folder)
    if shape.expert_parameters:
        notes.append("its experts stay in 16 bit; only the other linear layers are quantized")
    slow = not (folder / "tokenizer.json").is_file()
    if slow and not any((folder / name).is_file() for name in _SLOW_TOKENIZERS):
        raise BadInput("no tokenizer.json is in this folder", where=str(folder), hint=_WHOLE)
    return FolderContents(
        path=folder,
        files=tuple(files),
        shape=shape,
        stored_as=stored_as,
        weights_bytes=sum(path.stat().st_size for path in files),
        licence=read_licence(folder),
        notes=tuple(notes),
        slow_tokenizer=slow,
    )


def folder_shape(config: dict[str, Any], tensors: dict[str, TensorHeader]) -> ModelShape:
    """The shape by the config's family, else from the weights' headers.

    Raises:
        BadInput: neither way leads to one.
    """
    if language_config(config)["model_type"] in FAMILIES or is_vision_language(config):
        return read_shape(config)
    return shape_from_headers(config, tensors)


def copy_small_files(contents: FolderContents, folder: Path, progress: Progress | None) -> tuple[str, ...]:
    """Puts what the light side reads into the store's existing `folder`; returns notes.

    Raises:
        BadInput: the tokenizer cannot be converted.
        DiskProblem: the disk is full, or may not be written.
    """
    for name in SMALL_FILES:
        if (contents.path / name).is_file():
            shutil.copy2(contents.path / name, folder / name)
    notes: tuple[str, ...] = ()
    if contents.slow_tokenizer:
        notes = _convert_tokenizer(contents.path, folder, progress)
    template = contents.path / "chat_template.json"
    if template.is_file() and not (folder / "chat_template.jinja").exists():
        text = read_json(template).get("chat_template")
        if isinstance(text, str):
            (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    read_json(folder / "tokenizer.json")
    return notes


def small_files_changed(source: Path, folder: Path) -> bool:
    """Whether the source's config, tokenizer or template is another than the store's copy of it."""
    # Without a tokenizer.json the tokenizer's files in the store were made anew, and differ by nature.
    converted = not (source / "tokenizer.json").is_file()
    for name in SMALL_FILES:
        if converted and name in _TOKENIZER_FILES:
            continue
        original, kept = source / name, folder / name
        if original.is_file() and not (kept.is_file() and filecmp.cmp(original, kept)):
            return True
    return False


def template_kind(folder: Path) -> str:
    """Which kind of chat template a store folder has, in a word; `none` when it has none."""
    text = template_text(folder)
    if text is None:
        return "none"
    for mark, kind in _TEMPLATE_MARKS:
        if mark in text:
            return kind
    return "own"


def template_text(folder: Path) -> str | None:
    """The chat template as text, from chat_template.jinja or tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if not (folder / "tokenizer_config.json").is_file():
        return None
    value = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(value, list):
        named = {str(entry.get("name")): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default", next(iter(named.values()), None))
    return value if isinstance(value, str) else None


def _convert_tokenizer(source: Path, folder: Path, progress: Progress | None) -> tuple[str, ...]:
    made = folder / "tokenizer.tmp"
    made.mkdir()
    try:
        notes = convert("tokenizer", source, made, progress).notes
        for path in made.iterdir():
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return notes


def _check_weights_belong(shape: ModelShape, tensors: dict[str, TensorHeader], folder: Path) -> None:
    stored = sum(tensor.entries for tensor in tensors.values())
    if stored < shape.parameters:
        raise BadInput(
            f"config.json describes {shape.parameters:,} parameters, the weight files hold {stored:,}",
            where=str(folder),
            hint=_WHOLE,
        )


_WHOLE = "Bring the model's whole folder: config.json, tokenizer.json, tokenizer_config.json and all *.safetensors"
_TEMPLATE_MARKS = (
    ("<|start_header_id|>", "Llama 3"),
    ("<start_of_turn>", "Gemma"),
    ("<|start|>", "Harmony"),
    ("<|start_of_role|>", "Granite"),
    ("<|im_start|>", "ChatML"),
    ("[INST]", "Mistral"),
    ("<|assistant|>", "Phi / Zephyr"),
    ("<|user|>", "Phi / Zephyr"),
)
