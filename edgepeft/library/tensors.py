"""What an adapter's weights file holds, read from its header alone: no tensor data and no torch.

The safetensors format: eight bytes little-endian with the length of a JSON header that gives each tensor's dtype, shape
and place (huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec

from edgepeft.errors import BadInput
from edgepeft.library.card import ChangedParameter
from edgepeft.models.shape import ModelShape

_LONGEST_HEADER_BYTES = 100 * 1024 * 1024
_LORA = re.compile(
    r"(?:^|\.)layers\.(?P<layer>\d+)\.(?P<linear>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight$"
)


class Header(msgspec.Struct, frozen=True):
    """The tensors of one safetensors file."""

    shapes: dict[str, tuple[int, ...]]
    """Tensor name → shape."""
    dtypes: dict[str, str]
    """Tensor name → dtype as the format writes it, such as `F32`."""

    @property
    def parameters(self) -> tuple[ChangedParameter, ...]:
        """The tensors as a card lists them."""
        return tuple(ChangedParameter(name, shape) for name, shape in self.shapes.items())


def read_header(path: Path) -> Header:
    """The header of a safetensors file.

    Raises:
        BadInput: the file is cut short or is not safetensors.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _LONGEST_HEADER_BYTES:
                raise BadInput(
                    "is not a safetensors file", where=str(path), hint="Copy it again from its source"
                )
            header: dict[str, Any] = msgspec.json.decode(file.read(length))
        tensors = {name: value for name, value in header.items() if name != "__metadata__"}
        end = max((value["data_offsets"][1] for value in tensors.values()), default=0)
        shapes = {name: tuple(int(size) for size in value["shape"]) for name, value in tensors.items()}
        dtypes = {name: str(value["dtype"]) for name, value in tensors.items()}
    except (
        OSError,
        msgspec.DecodeError,
        UnicodeDecodeError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        raise BadInput(
            f"cannot be read as safetensors: {error}", where=str(path), hint="Copy it again from its source"
        ) from error
    if path.stat().st_size < 8 + length + end:
        raise BadInput("is cut short", where=str(path), hint="Copy it again from its source")
    return Header(shapes, dtypes)


def lora_dimensions(header: Header) -> dict[str, dict[int, tuple[int | None, int | None]]]:
    """Linear name → layer → (in_features, out_features) of the LoRA pairs; None where one side is missing."""
    found: dict[str, dict[int, tuple[int | None, int | None]]] = {}
    for name, shape in header.shapes.items():
        match = _LORA.search(name)
        if match is None or len(shape) != 2:
            continue
        layers = found.setdefault(match["linear"], {})
        layer = int(match["layer"])
        inner, outer = layers.get(layer, (None, None))
        layers[layer] = (shape[1], outer) if match["side"] == "A" else (inner, shape[0])
    return found


def shape_mismatch(header: Header, config: dict[str, Any], shape: ModelShape) -> str | None:
    """Why the adapter cannot belong to a base of this shape; None when every dimension agrees."""
    found = lora_dimensions(header)
    known = {linear.name: linear for linear in shape.linears}
    for name, layers in found.items():
        linear = known.get(name)
        if linear is None:
            return f"it changes {name}, which this base does not have"
        for layer, (inner, outer) in sorted(layers.items()):
            if layer >= shape.layers:
                return f"it changes layer {layer}, and this base has {shape.layers} layers"
            if inner not in (None, linear.in_features) or outer not in (None, linear.out_features):
                return (
                    f"its {name} of layer {layer} maps {inner} to {outer} features, "
                    f"this base's maps {linear.in_features} to {linear.out_features}"
                )
        if config.get("layers_to_transform") is None and len(layers) < shape.layers:
            return f"it changes {name} in {len(layers)} layers, and this base has {shape.layers}"
    return None


def dimensions_differ(first: Header, second: Header) -> bool:
    """Whether two adapters cannot belong to one base: a linear that both change has another size or layer count."""
    ours, theirs = lora_dimensions(first), lora_dimensions(second)
    return any(ours[name] != theirs[name] for name in ours.keys() & theirs.keys())
