"""The dry run: what it counts, and that few layers tell of many."""

from __future__ import annotations

import gc
from typing import Any

import msgspec
import pytest
import torch

from edgepeft.engine.ledger import LiveBytes, current_place
from edgepeft.engine.simulate import dry_run
from edgepeft.engine.simulate.layers import few_layers
from edgepeft.engine.simulate.model import layer_period, read_config
from edgepeft.errors import BadInput, UsageError
from edgepeft.memory.breakdown import Phase
from edgepeft.memory.dry_run import DryRun, DryRunRequest
from edgepeft.memory.target import CPU, Target
from edgepeft.memory.weights import base_bytes
from edgepeft.memory.workload import Workload, full_workload
from edgepeft.methods import LoraConfig
from edgepeft.models.config import read_shape
from shapes import run_spec
from tiny import tiny_config

AMPERE, TURING = Target("cuda", (8, 6)), Target("cuda", (7, 5))
WORKLOAD = Workload(320, 300, 200, held_out_tokens=90, held_out_longest=90, held_out_trained=40)
COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
    "pad_token_id": 0,
}
DEEP: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 100},
    "gemma3_text": {"head_dim": 16, "sliding_window": 100, "sliding_window_pattern": 3},
    "phi3": {},
    "mixtral": {"num_local_experts": 4},
}


def config_of(kind: str, layers: int) -> dict[str, Any]:
    return {"model_type": kind, "num_hidden_layers": layers, **COMMON, **DEEP[kind]}


def request(config: dict[str, Any], target: Target = CPU, workload: Workload = WORKLOAD, **spec: Any) -> DryRunRequest:
    return DryRunRequest(run_spec(**({"rank": 4} | spec)), config, workload, target)


def phases(answer: DryRun) -> dict[str, Phase]:
    return {phase.name: phase for phase in answer.memory.phases}


def live(phase: Phase) -> dict[str, int]:
    """What is not the allocator's."""
    return {name: size for name, size in phase.bytes_by_category.items() if name != "allocator slack"}


@pytest.mark.parametrize(
    ("kind", "layers", "target", "checkpointing", "alone"),
    [
        ("llama", 9, CPU, "layer", False),
        ("llama", 9, AMPERE, "none", True),
        ("qwen3", 10, TURING, "layer", True),
        ("gemma2", 12, CPU, "none", False),
        ("gemma3_text", 17, AMPERE, "layer", False),
        ("phi3", 9, CPU, "layer", True),
        ("mixtral", 9, CPU, "none", True),
    ],
)
def test_few_layers_tell_of_many_to_the_byte(
    kind: str, layers: int, target: Target, checkpointing: str, alone: bool
) -> None:
    asked = request(
        config_of(kind, layers),
        target,
        msgspec.structs.replace(WORKLOAD, alone=alone),
        checkpointing=checkpointing,
    )
    few = dry_run(asked)
    full = dry_run(msgspec.structs.replace(asked, full=True))
    assert full.simulated == (layers,)
    assert sum(few.simulated) < layers
    for phase in full.memory.phases:
        found = phases(few)[phase.name]
        assert (found.place, live(found)) == (phase.place, live(phase)), phase.name


def test_a_period_of_layers_is_seen_in_the_config() -> None:
    assert layer_period(read_config(config_of("llama", 12))) == 1
    assert layer_period(read_config(config_of("gemma2", 12))) == 2
    assert layer_period(read_config({**config_of("gemma3_text", 13), "sliding_window_pattern": 6})) == 6
    uneven = {**config_of("gemma3_text", 8), "layer_types": ["sliding_attention"] * 5 + ["full_attention"] * 3}
    assert layer_period(read_config(uneven)) >= 5


@pytest.mark.parametrize("period", [1, 2, 6])
def test_small_models_end_with_the_kinds_that_the_large_one_ends_with(period: int) -> None:
    for layers in range(2, 100):
        counts = few_layers(layers, period)
        if counts is None:
            assert layers <= 2 * (2 * period + 1) + period
            continue
        assert counts[1] - counts[0] == period
        assert (layers - counts[0]) % period == 0
        assert counts[0] >= period + 2


@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16"])
def test_the_base_is_what_its_shape_says(precision: Any) -> None:
    config = tiny_config(num_hidden_layers=3)
    step = phases(dry_run(request(config, precision=precision)))["train step"].bytes_by_category
    held = base_bytes(read_shape(config), precision, "bf16")
    # Rotary frequencies, float32, are there twice; the embedding is tied and counts once.
    assert step["frozen weights"] == held["frozen weights"] + 2 * 4 * 8
    assert step["embeddings and head"] == held["embeddings and head"] == 2 * 260 * 64
    assert step.get("quantization constants", 0) == held["quantization constants"]


def test_adapter_gradients_and_optimizer_state_are_what_the_method_says() -> None:
    step = phases(dry_run(request(tiny_config(), rank=4)))["train step"].bytes_by_category
    parameters = 2 * 4 * sum((64 + 64, 64 + 32, 64 + 32, 64 + 64, 64 + 128, 64 + 128, 128 + 64))
    tensors = 2 * 7 * 2
    assert step["adapter weights"] == 4 * parameters
    assert step["gradients"] == 4 * parameters
    assert step["optimizer state"] == 2 * 4 * parameters + 4 * tensors


def test_experts_stay_in_16_bit() -> None:
    nf4, bf16 = (
        phases(dry_run(request(config_of("mixtral", 2), precision=precision)))["train step"].bytes_by_category
        for precision in ("nf4", "bf16")
    )
    experts = 2 * 4 * 3 * 64 * 96 * 2
    assert nf4["frozen weights"] > experts
    attention = 2 * (2 * 64 * 64 + 2 * 64 * 32)
    assert bf16["frozen weights"] - nf4["frozen weights"] == pytest.approx(1.5 * attention, rel=0.01)


def test_memory_moves_with_what_is_asked() -> None:
    def peak(**changes: Any) -> int:
        return phases(dry_run(request(config_of("llama", 4), **changes)))["train step"].total_bytes

    plain = peak()
    assert peak(rank=16) > plain
    assert peak(checkpointing="none") > plain
    assert peak(precision="bf16") > plain
    assert peak(workload=full_workload(640, 300)) > plain
    assert peak(workload=msgspec.structs.replace(WORKLOAD, alone=True)) < plain


def test_a_card_has_its_own_kernels_and_rows() -> None:
    config = config_of("llama", 3)
    cpu, ampere, turing = (phases(dry_run(request(config, target)))["train step"] for target in (CPU, AMPERE, TURING))
    assert cpu.reserved_bytes is None
    assert "device context" not in cpu.bytes_by_category
    for phase in (ampere, turing):
        assert phase.reserved_bytes == phase.total_bytes
        assert phase.bytes_by_category["device context"] > 0
        assert phase.bytes_by_category["allocator slack"] > 0
    # One kernel for all samples, or each sample by itself with its heads repeated.
    assert live(ampere) != live(turing)


def test_the_70b_model_needs_no_weights() -> None:
    config = tiny_config(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
    )
    answer = dry_run(request(config, AMPERE, full_workload(2048, 2048), rank=16))
    assert (answer.layers, sum(answer.simulated)) == (80, 7)
    step = phases(answer)["train step"]
    assert 40e9 < step.total_bytes < 48e9
    assert step.bytes_by_category["adapter weights"] == 4 * 16 * 80 * (2 * 16384 + 2 * 9216 + 3 * (8192 + 28672))


def test_nothing_of_a_dry_run_stays() -> None:
    with LiveBytes(torch.device("cpu")) as ledger:
        before = ledger.live_bytes
        dry_run(request(tiny_config()))
        gc.collect()
        assert ledger.live_bytes - before < 10_000
    place = current_place()
    dry_run(request(tiny_config()))
    assert current_place() == place


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "no_such_model"}, "does not know this model"),
        ({"model_type": None}, "missing"),
        ({"model_type": "bert"}, "BertModel"),
        ({"model_type": "t5"}, "no causal language model"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 10**9}, "more than any model has"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"vocab_size": 1 << 60}, "more than any model has"),
        ({"num_attention_heads": "many"}, "num_attention_heads is 'many'"),
        ({"rope_parameters": {"rope_type": "no such"}}, r"refuses it|no model can be made of it"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        dry_run(request({**tiny_config(), **changes}))


@pytest.mark.parametrize(
    "workload",
    [
        Workload(0, 0, 0),
        Workload(-4, 1, 1),
        Workload(10, 11, 5),
        Workload(10, 10, 11),
        Workload(1 << 40, 10, 10),
        Workload(10, 10, 10, held_out_tokens=5, held_out_longest=6),
    ],
)
def test_a_workload_that_cannot_be_is_refused(workload: Workload) -> None:
    with pytest.raises(UsageError, match=r"not possible|cannot have"):
        dry_run(request(tiny_config(), workload=workload))


def test_a_method_that_does_not_suit_the_model_is_refused() -> None:
    asked = request(tiny_config())
    recipe = msgspec.structs.replace(asked.spec.recipe, method=LoraConfig(targets=("no_such_proj",)))
    with pytest.raises(UsageError, match="no_such_proj"):
        dry_run(msgspec.structs.replace(asked, spec=msgspec.structs.replace(asked.spec, recipe=recipe)))


def test_dropout_draws_its_masks_in_the_dry_run_too() -> None:
    asked = request(tiny_config())
    recipe = msgspec.structs.replace(asked.spec.recipe, method=LoraConfig(rank=4, dropout=0.1))
    dropped = dry_run(msgspec.structs.replace(asked, spec=msgspec.structs.replace(asked.spec, recipe=recipe)))
    assert phases(dropped)["train step"].total_bytes >= phases(dry_run(asked))["train step"].total_bytes
