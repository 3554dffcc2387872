"""Tiny bases of several architectures and adapters on them, for tests of merging and exporting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapter_files import make_card
from edgepeft.engine.combine import jobs
from edgepeft.engine.methods import attach, set_active
from edgepeft.engine.methods.files import read_adapter, save_adapter
from edgepeft.engine.model.load import LoadedModel, load_model
from edgepeft.library.merging import Merged, MergeRequest
from edgepeft.library.store import write_card
from edgepeft.methods import LoraConfig, MethodConfig
from edgepeft.models.store import ModelEntry, ensure_model
from tiny import CHATML, write_split_tokenizer

CPU = torch.device("cpu")
IDS = torch.randint(0, 250, (2, 19), generator=torch.Generator().manual_seed(5))
PROMPTS = tuple(tuple(row) for row in IDS.tolist())
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 260,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 258,
    "pad_token_id": 259,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}


def config_of(kind: str, **changes: Any) -> Any:
    """A tiny config of an architecture that GGUF files are written for."""
    settings = TEXT | changes
    if kind == "llama":
        return transformers.LlamaConfig(**settings)
    if kind == "llama3":
        return transformers.LlamaConfig(**settings, rope_parameters=LLAMA3)
    if kind == "mistral":
        return transformers.MistralConfig(**settings, sliding_window=None)
    if kind == "qwen2":
        del settings["head_dim"]
        return transformers.Qwen2Config(**settings)
    if kind == "qwen2-yarn":
        return config_of("qwen2", **changes, rope_parameters=YARN)
    if kind == "qwen3":
        return transformers.Qwen3Config(**settings)
    if kind == "gemma2":
        return transformers.Gemma2Config(**settings, query_pre_attn_scalar=16, sliding_window=64)
    assert kind == "gemma3"
    return transformers.Gemma3TextConfig(**settings, query_pre_attn_scalar=16, sliding_window=64)


def write_base(folder: Path, kind: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A model folder of random weights with a tokenizer whose splitting llama.cpp knows."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config_of(kind, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Large enough that the layers matter, and norms that are not all alike.
            parameter.copy_(torch.randn(parameter.shape) * 0.1 + (name.endswith("norm.weight") and "gemma" not in kind))
    model.to(dtype).save_pretrained(folder)
    write_split_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def write_adapter(folder: Path, entry: ModelEntry, config: MethodConfig | None = None, *, size: float = 0.05) -> Path:
    """An adapter, a LoRA where nothing is said, of random values: A and B by themselves, others around their start."""
    loaded = load(entry)
    adapter = attach(loaded, "a", config or LoraConfig(rank=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters().items():
            if name.endswith(("lora_A.weight", "lora_B.weight")):
                parameter.zero_()
            parameter += torch.randn(parameter.shape, generator=generator) * size
    save_adapter(folder, adapter, entry.name)
    return folder


def give_card(folder: Path, entry: ModelEntry, **changes: Any) -> None:
    """A card that says it was trained on `entry`."""
    write_card(folder, make_card(**({"base": entry.name, "base_fingerprint": entry.fingerprint} | changes)))


def load(entry: ModelEntry, precision: Any = "fp32", compute: Any = "fp32") -> LoadedModel:
    return load_model(entry, precision=precision, compute_dtype=compute, device=CPU)


def adapted_logits(entry: ModelEntry, adapter: Path, precision: Any = "fp32", compute: Any = "fp32") -> Tensor:
    """Of the adapter on its base, by the engine that chats."""
    loaded = load(entry, precision, compute)
    read_adapter(adapter, loaded, "a")
    set_active(loaded, [("a", 1.0)])
    with torch.no_grad():
        found: Tensor = loaded.model(IDS).logits
    return found


def folder_logits(folder: Path, dtype: Any = "auto") -> Tensor:
    """Of a model folder, by transformers alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


def request_for(entry: ModelEntry, adapter: Path, work: Path, **changes: Any) -> MergeRequest:
    """A merge into float32 weights; `changes` go into it."""
    work.mkdir(parents=True)
    settings: dict[str, Any] = {
        "base": entry.name,
        "adapter": str(adapter),
        "title": "tiny with a",
        "adapter_name": "a@v1",
        "work": str(work),
        "into": "original",
        "dtype": "fp32",
        "format": "safetensors",
        "precision": "fp32",
        "compute_dtype": "fp32",
        "prompts": PROMPTS,
    }
    return MergeRequest(**(settings | changes))


def merge(entry: ModelEntry, adapter: Path, work: Path, **changes: Any) -> Merged:
    """Merges in this process."""
    return jobs.merge(request_for(entry, adapter, work, **changes), lambda what, fraction: None)


def entry_of(folder: Path) -> ModelEntry:
    return ensure_model(str(folder))


def largest(tensors: Sequence[Tensor]) -> int:
    return max(tensor.numel() for tensor in tensors)
