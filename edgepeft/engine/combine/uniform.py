"""A LoRA adapter in the form that every program reads: one rank, one alpha, no patterns.

vLLM applies one alpha / r to all modules and llama.cpp ignores rank-stabilised scaling: whatever scale a module was
trained with beside that is folded into its B, and smaller ranks are filled up with zeros.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edgepeft.engine.methods import PEFT_PREFIX, AttachedAdapter
from edgepeft.engine.methods.lora import LoraUpdate
from edgepeft.engine.saving import save_tensors
from edgepeft.errors import BadInput
from edgepeft.library.peft_config import plain_lora_config
from edgepeft.library.store import CONFIG_FILE, WEIGHTS_FILE
from edgepeft.methods.targets import table_of


class UniformLora(NamedTuple):
    """An adapter of one rank and one alpha."""

    rank: int
    alpha: float
    """The update is scaled by alpha / rank."""
    pairs: dict[str, tuple[Tensor, Tensor]]
    """Path of each linear → A [rank, in] and B [out, rank], float32."""


def is_plain_lora(adapter: AttachedAdapter) -> bool:
    """Whether its updates are nothing but products of A and B beside linears of layers."""
    return all(isinstance(update, LoraUpdate) and table_of(path) is None for path, update in adapter.updates.items())


def make_uniform(adapter: AttachedAdapter, shapes: Mapping[str, tuple[int, int]], where: str) -> UniformLora:
    """The adapter with its largest rank in all modules, and its commonest scale.

    Where it changes some layers only, the same linears of the other layers get zeros, so that their names alone say
    what is changed.

    Args:
        adapter: a LoRA.
        shapes: [out, in] of each decoder linear of the base.
        where: the adapter, for messages.

    Raises:
        BadInput: it is no LoRA.
    """
    updates: dict[str, LoraUpdate] = {}
    for path, update in adapter.updates.items():
        if table_of(path) is not None:
            raise BadInput(
                f"it changes {path}, and llama.cpp takes updates of the layers' linears alone",
                where=where,
                hint="edgepeft adapters merge makes a model of it where embedding and head are two tables",
            )
        if not isinstance(update, LoraUpdate):
            raise BadInput(
                f"its update of {path} is a {type(update).__name__}, and only LoRA can be exported",
                where=where,
                hint="Use it with edgepeft chat",
            )
        updates[path] = update
    rank = max(int(update.A.shape[0]) for update in updates.values())
    scale = Counter(update.factor for update in updates.values()).most_common(1)[0][0]
    alpha = scale * rank
    if not math.isclose(alpha, round(alpha), rel_tol=1e-9):
        # Some programs take whole numbers only.
        alpha, scale = float(rank), 1.0
    alpha = float(round(alpha))
    pairs = {}
    for path in _all_layers(list(updates), shapes):
        out_features, in_features = shapes[path]
        A, B = torch.zeros(rank, in_features), torch.zeros(out_features, rank)
        if path in updates:
            update = updates[path]
            own = int(update.A.shape[0])
            A[:own] = update.A.detach().float()
            # The factor of B is 1 exactly where nothing has to be folded.
            B[:, :own] = update.B.detach().float() * (1.0 if update.factor == scale else update.factor / scale)
        pairs[path] = (A, B)
    return UniformLora(rank, alpha, pairs)


def write_peft_folder(folder: Path, lora: UniformLora, base_name: str) -> int:
    """Writes adapter_config.json and adapter_model.safetensors as vLLM, llama.cpp and PEFT read them; returns bytes."""
    tensors = {}
    for path, (A, B) in lora.pairs.items():
        tensors[f"{PEFT_PREFIX}{path}.lora_A.weight"] = A
        tensors[f"{PEFT_PREFIX}{path}.lora_B.weight"] = B
    save_tensors(folder / WEIGHTS_FILE, tensors, hint="Free some space, or name another --out")
    config = plain_config(lora, base_name)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return sum((folder / name).stat().st_size for name in (WEIGHTS_FILE, CONFIG_FILE))


def plain_config(lora: UniformLora, base_name: str) -> dict[str, Any]:
    """adapter_config.json of an adapter of one rank and one alpha."""
    names = sorted({path.rsplit(".", 1)[-1] for path in lora.pairs})
    if any(_inside_more_than_language(path) for path in lora.pairs):
        # A last name alone would reach into the other towers.
        names = sorted(lora.pairs)
    return plain_lora_config(base_name, lora.rank, int(lora.alpha), names)


def _all_layers(paths: list[str], shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Every linear whose last name is among those of `paths`, in the model's order."""
    names = {path.rsplit(".", 1)[-1] for path in paths}
    if any(_inside_more_than_language(path) for path in paths):
        return [path for path in shapes if path in paths]
    return [path for path in shapes if path.rsplit(".", 1)[-1] in names]


def _inside_more_than_language(path: str) -> bool:
    return "language_model" in path
