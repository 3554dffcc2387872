"""Adapter folders for tests, written without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from edgepeft.library.card import Card, ChangedParameter, TemplateRecord
from edgepeft.methods import LoraConfig
from edgepeft.models.shape import ModelShape
from edgepeft.spec import BaseRef, DataRef, Layout, Recipe


def write_peft_folder(folder: Path, shape: ModelShape, *, rank: int = 4, seed: int = 0, **changes: Any) -> Path:
    """A folder as PEFT saves it, over every linear of `shape`; `changes` go into its config."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(shape.layers):
        for linear in shape.linears:
            prefix = f"base_model.model.model.layers.{layer}.{linear.name}"
            tensors[f"{prefix}.lora_A.weight"] = random.standard_normal((rank, linear.in_features)).astype(np.float32)
            tensors[f"{prefix}.lora_B.weight"] = random.standard_normal((linear.out_features, rank)).astype(np.float32)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": rank,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({linear.name.rsplit(".", 1)[-1] for linear in shape.linears}),
    } | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_lora(folder: Path, sizes: dict[str, tuple[int, int, int]], *, seed: int = 0, **changes: Any) -> Path:
    """A folder as PEFT saves it: module path → (rank, in, out); `changes` go into its config."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    tensors = {}
    for path, (rank, inner, outer) in sizes.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = random.standard_normal((rank, inner)).astype(np.float32)
        tensors[f"base_model.model.{path}.lora_B.weight"] = random.standard_normal((outer, rank)).astype(np.float32)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": next(iter(sizes.values()))[0],
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(sizes),
    } | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def dense_updates(folder: Path) -> dict[str, np.ndarray]:
    """Module path → ΔW [out, in] in float64, straight from the files of a folder that `write_lora` or we wrote."""
    from safetensors.numpy import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(str(folder / "adapter_model.safetensors"))
    found = {}
    for key, A in tensors.items():
        if ".lora_A." not in key:
            continue
        path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        alphas = config.get("alpha_pattern") or {}
        alpha = next((value for end, value in alphas.items() if path.endswith(end)), config["lora_alpha"])
        rank = A.shape[0]
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        found[path] = scale * tensors[key.replace("lora_A", "lora_B")].astype(np.float64) @ A.astype(np.float64)
    return found


def make_card(**changes: Any) -> Card:
    """A card; `changes` replace its fields, and precision, system and fingerprint those inside."""
    precision = changes.pop("precision", "nf4")
    system = changes.pop("system", None)
    fingerprint = changes.pop("base_fingerprint", "sha256:" + "a" * 64)
    recipe = Recipe(
        base=BaseRef("tiny", fingerprint, "LlamaForCausalLM"),
        data=DataRef("/data.jsonl", "sha256:d", "alpaca", system=system),
        method=LoraConfig(rank=4, alpha=8.0),
        precision=precision,
        compute_dtype="bf16",
        max_seq_len=128,
        samples_per_step=4,
    )
    fields: dict[str, Any] = {
        "name": "",
        "version": 0,
        "base": "tiny",
        "base_fingerprint": fingerprint,
        "recipe": recipe,
        "layout": Layout(micro_batch_tokens=128),
        "parameters": (ChangedParameter("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", (4, 64)),),
        "trainable_parameters": 256,
        "trainable_share": 0.01,
        "versions": {"torch": "2.13.0"},
        "template": TemplateRecord("{{ messages }}", "sha256:t", (258,)),
        "created": "2026-01-02T03:04:05+00:00",
        "run": "triage-1",
        "steps": 10,
        "metrics": {"eval_loss": 0.5, "train_seconds": 12.0, "measured_peak_bytes": 1e6},
    }
    return Card(**(fields | changes))
