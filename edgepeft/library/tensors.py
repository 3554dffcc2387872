"""Which base an adapter's tensors fit, told from the header of its weights file alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from edgepeft.methods.targets import TABLE_NAMES
from edgepeft.models.headers import TensorHeader
from edgepeft.models.shape import ModelShape

_LORA = re.compile(r"(?:^|\.)layers\.(?P<layer>\d+)\.(?P<linear>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight$")

_TABLE = re.compile(
    rf"(?:^|\.)(?P<table>{'|'.join(name for names in TABLE_NAMES.values() for name in names)})\."
    r"(?P<part>lora_embedding_A|lora_A|lora_B|base_layer)(?:\.[^.]+)?(?:\.weight)?$"
)


_OTHER_TOWERS = re.compile(r"(^|[._])(vision|visual|audio|speech|image|multi_modal|projector|connector)")


def in_other_tower(path: str) -> bool:
    """Whether a module path, or a tensor's name, lies in another part of a larger model than its language model."""
    return _OTHER_TOWERS.search(path.partition("layers.")[0]) is not None


def from_layers(path: str) -> str:
    """A module path from `layers.` on; the whole path where it has none.

    The language tower of a vision-language model lies under another prefix than the same model by itself.
    """
    _, mark, rest = path.partition("layers.")
    return mark + rest if mark else path


def lora_dimensions(tensors: Iterable[TensorHeader]) -> dict[str, dict[int, tuple[int | None, int | None]]]:
    """Linear name → layer → (in_features, out_features) of the LoRA pairs; None where one side is missing."""
    found: dict[str, dict[int, tuple[int | None, int | None]]] = {}
    for tensor in tensors:
        match = _LORA.search(tensor.name)
        if match is None or len(tensor.shape) != 2:
            continue
        layers = found.setdefault(match["linear"], {})
        layer = int(match["layer"])
        inner, outer = layers.get(layer, (None, None))
        layers[layer] = (tensor.shape[1], outer) if match["side"] == "A" else (inner, tensor.shape[0])
    return found


def table_ranks(tensors: Iterable[TensorHeader]) -> dict[str, int]:
    """The ranks of LoRA pairs of the embedding and the output head, by what the model calls these."""
    found: dict[str, int] = {}
    for tensor in tensors:
        match = _TABLE.search(tensor.name)
        if match is not None and match["part"] in ("lora_embedding_A", "lora_A") and tensor.shape:
            found[match["table"]] = tensor.shape[0]
    return found


def shape_mismatch(tensors: Iterable[TensorHeader], config: dict[str, Any], shape: ModelShape) -> str | None:
    """Why the adapter cannot belong to a base of this shape; None when every dimension agrees."""
    tensors = list(tensors)
    for tensor in tensors:
        match = _TABLE.search(tensor.name)
        if match is not None and match["part"] != "lora_A" and len(tensor.shape) == 2:
            tokens = tensor.shape[1 if match["part"] == "lora_embedding_A" else 0]
            if tokens != shape.vocab:
                return f"its {match['table']} has {tokens} tokens, and this base has {shape.vocab}"
    found = lora_dimensions(tensors)
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
        if not _names_layers(config) and len(layers) < shape.layers:
            return f"it changes {name} in {len(layers)} layers, and this base has {shape.layers}"
    return None


def _names_layers(config: dict[str, Any]) -> bool:
    """Whether the config restricts the adapter to some layers, or may do so by a pattern."""
    targets = config.get("target_modules")
    if config.get("layers_to_transform") is not None or (isinstance(targets, str) and targets != "all-linear"):
        return True
    return isinstance(targets, list) and any(re.search(r"(?:^|\.)\d+\.", str(target)) for target in targets)


def linear_of_other_size(first: Iterable[TensorHeader], second: Iterable[TensorHeader]) -> str | None:
    """A linear that both adapters change in some layer with different dimensions; None where there is none.

    Unlike `dimensions_differ`, it does not matter in which layers each of them changes it.
    """
    ours, theirs = lora_dimensions(first), lora_dimensions(second)
    for linear in ours.keys() & theirs.keys():
        layers = ours[linear].keys() & theirs[linear].keys()
        if any(ours[linear][layer] != theirs[linear][layer] for layer in layers):
            return linear
    return None


def dimensions_differ(first: Iterable[TensorHeader], second: Iterable[TensorHeader]) -> bool:
    """Whether two adapters cannot share a base: a linear that both change has another size or layer count."""
    ours, theirs = lora_dimensions(first), lora_dimensions(second)
    return any(ours[name] != theirs[name] for name in ours.keys() & theirs.keys())
