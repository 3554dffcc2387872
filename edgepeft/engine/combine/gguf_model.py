"""A merged model as one GGUF file, written tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    GGMLQuantizationType,
    GGUFReader,
    GGUFType,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
    quants,
    size_label,
)

from edgepeft.engine.combine.gguf_layout import (
    Pair,
    TensorNames,
    check_representable,
    hyperparameters,
    rope_divisors,
)
from edgepeft.engine.combine.gguf_vocabulary import vocabulary
from edgepeft.engine.combine.merge import MergedWeights
from edgepeft.engine.model.gguf import open_gguf
from edgepeft.engine.simulate.model import read_config
from edgepeft.errors import BadInput
from edgepeft.models.fingerprint import fingerprint_files
from edgepeft.models.references import is_gguf
from edgepeft.models.source_folder import read_json, template_text
from edgepeft.models.store import ModelEntry
from edgepeft.processes import Progress

FileKind = Literal["f16", "q8_0"]
_FILE_TYPES = {"f16": LlamaFileType.MOSTLY_F16, "q8_0": LlamaFileType.MOSTLY_Q8_0}
_OWN_KEYS = ("GGUF.", "split.", "quantize.", "imatrix.")
_REPLACED = frozenset(
    {
        "general.architecture",
        "general.type",
        "general.name",
        "general.finetune",
        "general.file_type",
        "general.quantization_version",
        "general.alignment",
    }
)
"""Keys of a base's file that say something else of the merged one."""
_ROPE = "rope_freqs.weight"
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


class _Planned(NamedTuple):
    name: str
    """In the file."""
    source: str
    """In the base's files; empty for one that is made here."""
    shape: tuple[int, ...]
    kind: GGMLQuantizationType

    @property
    def size_bytes(self) -> int:
        block, item = GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape)) // int(block) * int(item)


class GgufModel:
    """The file that a merged model becomes, planned before anything is written.

    Args:
        entry: the base; one that came from a GGUF file gives its metadata and tokenizer.
        merged: its weights with the adapter's update.
        kind: `f16`, or `q8_0`: blocks of 32 eight-bit values with a scale each.
        title: what the file says that it is.
        adapter: which adapter is in it, for the file's metadata.
        template: the chat template that the adapter was trained with; None keeps the base's.
        stop_ids: tokens that end an answer.

    Raises:
        BadInput: llama.cpp's code for the architecture does not compute this model, or its tokenizer is not known.
    """

    def __init__(
        self,
        entry: ModelEntry,
        merged: MergedWeights,
        kind: FileKind,
        *,
        title: str,
        adapter: str,
        template: str | None,
        stop_ids: Sequence[int],
    ) -> None:
        self._entry, self._merged, self._kind = entry, merged, kind
        self._title, self._adapter = title, adapter
        self._template, self._stop_ids = template, stop_ids
        folder = Path(entry.folder)
        self._config: Any = read_config(read_json(folder / "config.json"))
        self._names = TensorNames(self._config)
        self.notes = check_representable(self._config)
        self._reader = _reader_of(entry)
        self._divisors = rope_divisors(self._config)
        self._pairs = [] if self._reader is not None else self._fresh_pairs(folder)
        self.tensors = list(self._plan())
        """All tensors, in the file's order."""

    @property
    def size_bytes(self) -> int:
        """Of all tensors in the file."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    def write(self, path: Path, progress: Progress) -> None:
        """Writes the file.

        Raises:
            BadInput: a tensor has values that are not finite, or too large for 16 bit.
        """
        writer = GGUFWriter(str(path), self._names.layout.name)
        self._add_metadata(writer)
        for tensor in self.tensors:
            quantized = tensor.kind == GGMLQuantizationType.Q8_0
            shape = quants.quant_shape_to_byte_shape(tensor.shape, tensor.kind) if quantized else tensor.shape
            dtype = np.dtype(np.uint8 if quantized else np.float32)
            writer.add_tensor_info(tensor.name, shape, dtype, tensor.size_bytes, raw_dtype=tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        # The package writes a tensor at once; by parts, an embedding need not be in memory as a whole.
        with path.open("r+b") as file:
            file.seek(0, os.SEEK_END)
            done = 0
            for tensor in self.tensors:
                _pad(file, writer.data_alignment)
                progress("merging", done / self.size_bytes)
                begin = file.tell()
                for part in self._parts(tensor):
                    file.write(np.ascontiguousarray(part).data)
                done += tensor.size_bytes
                if file.tell() - begin != tensor.size_bytes:
                    raise ValueError(f"{file.tell() - begin} bytes of {tensor.name} came, {tensor.size_bytes} planned")
            _pad(file, writer.data_alignment)
            file.flush()
            os.fsync(file.fileno())

    def _plan(self) -> Iterator[_Planned]:
        if self._divisors is not None:
            yield _Planned(_ROPE, "", self._divisors.shape, GGMLQuantizationType.F32)
        for source, tensor in self._merged.tensors.items():
            name = self._names.find(source)
            if name is not None:
                yield _Planned(name, source, tensor.shape, self._kind_of(name, tensor.shape))

    def _kind_of(self, name: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
        if len(shape) < 2 or name.endswith("_norm.weight"):
            return GGMLQuantizationType.F32
        block, _ = GGML_QUANT_SIZES[GGMLQuantizationType.Q8_0]
        if self._kind == "q8_0" and shape[-1] % block == 0:
            return GGMLQuantizationType.Q8_0
        return GGMLQuantizationType.F16

    def _parts(self, tensor: _Planned) -> Iterator[np.ndarray]:
        if not tensor.source:
            assert self._divisors is not None
            yield self._divisors
            return
        half = tensor.kind == GGMLQuantizationType.F16
        parts = self._merged.parts(tensor.source, torch.float16 if half else torch.float32)
        if self._names.heads_to_interleave(tensor.source) is not None:
            parts = iter([self._names.reorder_rows(tensor.source, torch.cat(list(parts)))])
        for part in parts:
            if self._names.layout.norm_offset and tensor.name.endswith("norm.weight"):
                part = part + self._names.layout.norm_offset
            values = part.numpy()
            yield quants.quantize(values, tensor.kind) if tensor.kind == GGMLQuantizationType.Q8_0 else values

    def _fresh_pairs(self, folder: Path) -> list[Pair]:
        template = self._template or template_text(folder)
        pairs = hyperparameters(self._config) + vocabulary(folder, self._config.vocab_size, template)
        if self._entry.licence:
            pairs.append(("license", self._entry.licence))
        label = size_label(self._entry.shape.parameters, self._entry.shape.parameters, 0, 0)
        return [("size_label", label), *pairs]

    def _add_metadata(self, writer: GGUFWriter) -> None:
        writer.add_type(GGUFType.MODEL)
        writer.add_name(self._title)
        writer.add_finetune(self._adapter)
        if self._reader is not None:
            _copy_metadata(self._reader, writer)
            if self._template is not None:
                writer.kv_data[0].pop("tokenizer.chat_template", None)
                writer.add_chat_template(self._template)
        for name, value in self._pairs:
            getattr(writer, f"add_{name}")(value)
        self._add_ends(writer)
        writer.add_file_type(_FILE_TYPES[self._kind])
        writer.add_quantization_version(GGML_QUANT_VERSION)

    def _add_ends(self, writer: GGUFWriter) -> None:
        """Stop tokens of the adapter's template that the base's file does not know as ends."""
        known = writer.kv_data[0]
        keys = [f"tokenizer.ggml.{key}" for key in _END_KEYS]
        ends = {int(known[key].value) for key in keys if key in known}
        free = [key for key in keys if key not in known]
        for token in dict.fromkeys(token for token in self._stop_ids if token not in ends):
            if free:
                writer.add_uint32(free.pop(0), token)


def _reader_of(entry: ModelEntry) -> GGUFReader | None:
    """The GGUF file that the base was converted from, if it is still there as it was."""
    source = Path(entry.source)
    if entry.kind not in ("gguf", "embedded") or not source.is_file() or not is_gguf(source):
        return None
    return open_gguf(source) if fingerprint_files([source]) == entry.fingerprint else None


def _copy_metadata(reader: GGUFReader, writer: GGUFWriter) -> None:
    for key, field in reader.fields.items():
        if key.startswith(_OWN_KEYS) or key in _REPLACED or not field.types:
            continue
        kind, inner = field.types[0], field.types[-1]
        if kind != GGUFValueType.ARRAY:
            writer.add_key_value(key, field.contents(), kind)
        elif field.data:
            # As bytes: a vocabulary may hold what is no UTF-8.
            texts = inner == GGUFValueType.STRING
            values = [field.parts[i].tobytes() for i in field.data] if texts else field.contents()
            writer.add_key_value(key, values, kind, inner)


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))


def check_tokenizer(original: Path, written: Path) -> None:
    """Compares the tokenizer that was read back from a GGUF file with the base's on texts that tell kinds apart.

    Raises:
        BadInput: they split a text in different ways.
    """
    from tokenizers import Tokenizer

    ours, theirs = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (original, written))
    for text in _TELLING:
        if ours.encode(text, add_special_tokens=False).ids != theirs.encode(text, add_special_tokens=False).ids:
            raise BadInput(
                f"the tokenizer read back from the GGUF file splits {text!r} in another way than the base's",
                where=str(original),
                hint="Write safetensors instead",
            )


_TELLING = (
    "The quick brown fox isn't quick: it's 12345 years old, 3.14159 m tall.",
    "  two  blanks,\ttabs\t\tand\n\nlines\r\n",
    "def f(x):\n    return x**2  # Größe, naïve, 東京, привет, 🙂",
    "IT'S we'LL I'VE they'D 2024-01-01 $9,999.00",
)
