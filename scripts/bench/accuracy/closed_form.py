"""The closed form against the dry run: configurations drawn from the seed, from tiny widths to those of 70B models.

Both are asked for the same run, a configuration's train step and its evaluation; nothing is trained. Compared is what
tensors and the device's own rows hold. What the CUDA allocator keeps beyond them is a share in the closed form and a
simulation in the dry run: each row tells it as `slack_predicted_bytes` and `slack_measured_bytes`, beside the error.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import msgspec

from edgepeft.engine.simulate import dry_run
from edgepeft.memory.breakdown import Category, Phase
from edgepeft.memory.dry_run import DryRunRequest
from edgepeft.memory.estimate import estimate_training
from edgepeft.memory.target import CPU, Target
from edgepeft.memory.workload import Workload
from edgepeft.methods import LoraConfig, id_of
from edgepeft.models.config import read_shape
from edgepeft.plan.reasons import method_values
from edgepeft.spec import BaseRef, DataRef, Layout, Optimizer, Recipe, RunSpec

FAMILIES = (
    "llama",
    "mistral",
    "ministral3",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "smollm3",
    "olmo2",
    "olmo3",
    "granite",
)
CONFIGURATIONS, QUICK_CONFIGURATIONS = 204, 13
PHASES = ("train step", "evaluation")
SLACK: Category = "allocator slack"
TARGETS = (
    CPU,
    CPU,
    Target("cuda", (8, 9)),
    Target("cuda", (7, 5)),
    Target("cuda", (8, 6), expandable_segments=False),
)


class Case(msgspec.Struct, frozen=True):
    """One configuration."""

    config: dict[str, Any]
    spec: RunSpec
    workload: Workload
    target: Target


def measure(seed: int, quick: bool) -> list[dict[str, Any]]:
    """Rows of configuration, `predicted_bytes`, `measured_bytes` and `error` = predicted / measured - 1."""
    cases = draw(seed, QUICK_CONFIGURATIONS if quick else CONFIGURATIONS)
    rows = []
    for number, case in enumerate(cases, 1):
        rows += compare(case)
        print(f"\r  {number} of {len(cases)} configurations", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return rows


def draw(seed: int, count: int) -> list[Case]:
    """Configurations: families, precisions and devices in turn, the rest by chance."""
    chance = random.Random(seed)
    precisions = ("nf4", "bf16", "int8", "nf4", "fp32")
    return [
        _case(
            chance,
            FAMILIES[number % len(FAMILIES)],
            precisions[number % len(precisions)],
            TARGETS[(number + number // len(TARGETS)) % len(TARGETS)],
        )
        for number in range(count)
    ]


def compare(case: Case) -> list[dict[str, Any]]:
    """Two rows: the train step and the evaluation."""
    shape = read_shape(case.config)
    predicted = estimate_training(case.spec, shape, case.workload, case.target)
    simulated = dry_run(DryRunRequest(case.spec, case.config, case.workload, case.target))
    rows = []
    for name in PHASES:
        ours, theirs = (
            next(phase for phase in memory.phases if phase.name == name) for memory in (predicted, simulated.memory)
        )
        rows.append(
            _described(case)
            | {
                "phase": name,
                "place": theirs.place,
                "place_predicted": ours.place,
                "predicted_bytes": _without_slack(ours),
                "measured_bytes": _without_slack(theirs),
                "slack_predicted_bytes": ours.bytes_by_category.get(SLACK, 0),
                "slack_measured_bytes": theirs.bytes_by_category.get(SLACK, 0),
                "error": _without_slack(ours) / _without_slack(theirs) - 1,
            }
        )
    return rows


def _without_slack(phase: Phase) -> int:
    return phase.total_bytes - phase.bytes_by_category.get(SLACK, 0)


def _described(case: Case) -> dict[str, Any]:
    recipe, layout, workload, config = case.spec.recipe, case.spec.layout, case.workload, case.config
    device = case.target.kind
    if case.target.capability is not None:
        device += " {}.{}".format(*case.target.capability)
    return {
        "family": config["model_type"],
        "layers": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "inner": config["intermediate_size"],
        "heads": f"{config['num_attention_heads']}/{config['num_key_value_heads']} of {config['head_dim']}",
        "vocab": config["vocab_size"],
        "device": device,
        "precision": recipe.precision,
        "compute": recipe.compute_dtype,
        "method": id_of(recipe.method),
        "settings": ", ".join(f"{name} {value}" for name, value in method_values(recipe.method).items()),
        "optimizer": recipe.optimizer.name,
        "tokens": workload.tokens,
        "longest": workload.longest,
        "trained": workload.trained,
        "alone": workload.alone,
        "checkpointing": layout.checkpointing,
        "chunk": layout.loss_chunk_tokens,
    }


def _case(chance: random.Random, family: str, precision: Any, target: Target) -> Case:
    config = _config(chance, family)
    computes = ("bf16", "bf16", "bf16", "fp16", "fp32") if target.kind == "cuda" else ("bf16", "bf16", "fp32")
    rank = min(chance.choice((4, 8, 16, 32, 64)), config["num_key_value_heads"] * config["head_dim"])
    recipe = Recipe(
        base=BaseRef("drawn", "sha256:0", ""),
        data=DataRef("", "", ""),
        method=LoraConfig(
            rank=rank,
            targets=_targets(chance, family),
            dropout=chance.choice((0.0, 0.0, 0.05)),
        ),
        precision=precision,
        compute_dtype=chance.choice(computes),
        max_seq_len=8192,
        samples_per_step=16,
        optimizer=Optimizer(name="adamw8bit" if rank > 16 else "adamw"),
    )
    layout = Layout(
        micro_batch_tokens=16384,
        checkpointing=chance.choice(("layer", "offload" if target.kind == "cuda" else "layer", "none")),
        loss_chunk_tokens=chance.choice((32, 64, 256, 1024)),
    )
    tokens, longest = _length(chance)
    held_out, held_out_longest = _length(chance)
    workload = Workload(
        tokens=tokens,
        longest=longest,
        trained=chance.randint(1, tokens),
        alone=chance.random() < 0.3,
        held_out_tokens=held_out,
        held_out_longest=held_out_longest,
        held_out_trained=chance.randint(1, held_out),
    )
    return Case(config, RunSpec(recipe, layout), workload, target)


def _config(chance: random.Random, family: str) -> dict[str, Any]:
    head_dim = chance.choice((32, 64, 64, 80, 128, 128, 256) if family.startswith("gemma") else (32, 64, 64, 96, 128))
    kv_heads = chance.choice((1, 2, 4, 8))
    heads = kv_heads * chance.choice((1, 2, 3, 4, 8))
    hidden = heads * (
        head_dim if family in ("phi3", "olmo2", "olmo3") else chance.choice((64, head_dim, head_dim, 160))
    )
    config = {
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": round(hidden * chance.uniform(1.5, 6) / 64) * 64,
        "num_hidden_layers": chance.choice((1, 2, 3, 12, 24, 32, 80)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": chance.choice((2048, 32000, 49152, 128256, 262144)),
        "max_position_embeddings": 16384,
        "tie_word_embeddings": chance.random() < 0.5,
        "dtype": "bfloat16",
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    window = chance.choice((256, 1024, 4096))
    if family in ("mistral", "gemma2", "gemma3_text", "olmo3"):
        config["sliding_window"] = window
    if family == "gemma3_text":
        config["sliding_window_pattern"] = 6
    if family in ("llama", "qwen3") and chance.random() < 0.2:
        config["attention_bias"] = True
    if family == "phi3":
        config |= {"partial_rotary_factor": chance.choice((1.0, 0.75)), "original_max_position_embeddings": 16384}
    return config


def _targets(chance: random.Random, family: str) -> tuple[str, ...]:
    attention = ("qkv_proj", "o_proj") if family == "phi3" else ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp = ("gate_up_proj", "down_proj") if family == "phi3" else ("gate_proj", "up_proj", "down_proj")
    few = ("qkv_proj",) if family == "phi3" else ("q_proj", "v_proj")
    return chance.choice((("all-linear",), ("all-linear",), ("all-linear",), attention, mlp, few))


def _length(chance: random.Random) -> tuple[int, int]:
    """Tokens of a micro-batch, and of its longest sample."""
    tokens = round(2 ** chance.uniform(4, 14))
    share = chance.choice((1.0, 0.5, 0.3, 0.1))
    return tokens, max(1, min(8192, round(tokens * share)))
