"""What an allocator reserves for many layers, told from the traces of few."""

from __future__ import annotations

from typing import Any

import pytest

from edgepeft.engine.model.frozen import dynamic_values
from edgepeft.engine.simulate import dry_run
from edgepeft.engine.simulate.allocator import CachingAllocator
from edgepeft.engine.simulate.layers import few_layers
from edgepeft.engine.simulate.model import layer_count, layer_period, read_config, with_layers
from edgepeft.engine.simulate.replay import Recording, replay, replay_repeated
from edgepeft.engine.simulate.step import simulate
from edgepeft.memory.dry_run import DryRunRequest
from edgepeft.memory.target import Target
from edgepeft.memory.workload import full_workload
from edgepeft.units import MIB
from shapes import run_spec

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
GEMMA: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 6,
    "sliding_window": 64,
    "vocab_size": 8000,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (LLAMA, {}),
        (LLAMA | {"tie_word_embeddings": True}, {"checkpointing": "none", "precision": "int8", "rank": 64}),
        (GEMMA, {"precision": "bf16"}),
    ],
    ids=["llama", "llama, tied, without checkpointing", "gemma"],
)
def test_few_layers_tell_what_the_whole_model_reserves(config: dict[str, Any], changes: dict[str, Any]) -> None:
    request = DryRunRequest(run_spec(**changes), config, full_workload(512, 200), Target("cuda", (8, 9)))
    read = read_config(config)
    layers, period = layer_count(read), layer_period(read)
    few = few_layers(layers, period)
    assert few is not None
    dynamic_values()  # fake tensors cannot compute them; afterwards they are remembered
    one, other, whole = (
        simulate(with_layers(read, count), count, request, period=period).recording for count in (*few, layers)
    )
    for expandable in (True, False):
        found = replay_repeated(one, other, layers, period, CachingAllocator(expandable))
        real = replay(whole, CachingAllocator(expandable))
        assert found is not None
        assert list(found) == ["load", "train step", "evaluation", "save"]
        assert found["load"] == real["load"]
        assert found["train step"] == pytest.approx(real["train step"], rel=0.01)
        # After a step, what lies where depends on the order of equal storages.
        assert found == pytest.approx(real, rel=0.06)


def test_a_dry_run_for_a_card_tells_what_is_reserved_and_not_filled() -> None:
    peaks = []
    for expandable in (True, False):
        target = Target("cuda", (8, 9), expandable)
        answer = dry_run(DryRunRequest(run_spec(), LLAMA, full_workload(512, 200), target))
        for phase in answer.memory.phases:
            assert phase.reserved_bytes == phase.total_bytes
            # Whole pages or segments of 2 MiB, beside the context.
            assert (phase.total_bytes - phase.bytes_by_category["device context"]) % (2 * MIB) == 0
        peaks.append(answer.memory.peak_bytes)
    assert peaks[0] != peaks[1]


def trace(layers: int, *, kept: int = 3 * MIB, odd: bool = False) -> Recording:
    """A model that loads and runs forward and backward; an odd one has storages that become fewer with the layers."""
    place = "loading"
    recording = Recording(lambda: place)
    key = 0

    def born(size: int) -> int:
        nonlocal key
        key += 1
        recording.born(key, size)
        return key

    shared = born(MIB)
    if odd:
        for _ in range(5 - layers):
            born(777)
    for layer in range(1, layers + 1):
        place = f"loading layer {layer}"
        born(11 * MIB)
    place = "forward"
    hidden = born(5 * MIB)
    saved = {}
    for layer in range(1, layers + 1):
        place = f"forward of layer {layer}"
        saved[layer] = born(kept)
        following = born(5 * MIB)
        recording.died(hidden)
        hidden = following
    place = "loss"
    gradient = born(5 * MIB)
    recording.died(hidden)
    gradients = []
    for layer in range(layers, 0, -1):
        place = f"backward of layer {layer}"
        following = born(5 * MIB)
        gradients.append(born(MIB))
        recording.died(gradient)
        recording.died(saved[layer])
        gradient = following
    place = "update"
    recording.died(gradient)
    states = born(2 * MIB * layers)
    for one in gradients:
        recording.died(one)
    recording.end("train step")
    recording.died(states)
    recording.died(shared)
    recording.end("save")
    return recording


@pytest.mark.parametrize("expandable", [True, False])
@pytest.mark.parametrize("layers", [4, 5, 17, 60])
def test_a_repeated_trace_leaves_what_the_real_one_leaves(layers: int, expandable: bool) -> None:
    repeated, real = CachingAllocator(expandable), CachingAllocator(expandable)
    found = replay_repeated(trace(3), trace(4), layers, 1, repeated)
    assert found == replay(trace(layers), real)
    assert repeated.allocated_bytes == real.allocated_bytes
    assert repeated.peak_allocated_bytes == real.peak_allocated_bytes


def test_traces_that_differ_in_more_than_layers_are_not_repeated() -> None:
    assert replay_repeated(trace(3, odd=True), trace(4, odd=True), 20, 1, CachingAllocator(True)) is None
    assert replay_repeated(trace(3, kept=MIB), trace(2), 20, 1, CachingAllocator(True)) is None
