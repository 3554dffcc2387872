"""The closed form: it grows with what costs memory, its parts add up, and known figures come out."""

from __future__ import annotations

from math import prod

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from edgepeft.errors import UsageError
from edgepeft.memory.breakdown import Breakdown
from edgepeft.memory.chat import AdapterBytes, adapter_bytes, estimate_chat, formed_head_bytes, kv_cache_bytes
from edgepeft.memory.estimate import estimate_training
from edgepeft.memory.target import Target
from edgepeft.memory.unseen import unseen_bytes
from edgepeft.memory.weights import base_bytes, matrix_bytes
from edgepeft.memory.workload import full_workload
from edgepeft.methods import LoraConfig, count_parameters, method_of
from edgepeft.models.headers import TensorHeader
from edgepeft.models.shape import LinearShape
from edgepeft.units import GIB
from shapes import LLAMA_8B, SMOLLM2, llama_shape, run_spec


def peak(shape=SMOLLM2, *, device="cpu", longest=256, alone=False, **changes) -> int:
    return estimate(shape, device=device, longest=longest, alone=alone, **changes).peak_bytes


def estimate(shape=SMOLLM2, *, device="cpu", longest=256, alone=False, **changes) -> Breakdown:
    spec = run_spec(**changes)
    workload = msgspec.structs.replace(full_workload(spec.layout.micro_batch_tokens, longest), alone=alone)
    return estimate_training(spec, shape, workload, Target(device))


def test_nf4_with_double_quantization_costs_4_127_bits():
    weights, constants = matrix_bytes(4096 * 14336, 4096, "nf4")
    assert weights == 4096 * 14336 // 2
    assert 8 * (weights + constants) / (4096 * 14336) == pytest.approx(4.127, abs=0.0005)


def test_int8_has_one_float_a_row():
    assert matrix_bytes(64 * 32, 64, "int8") == (2048, 256)


def test_tied_embedding_counts_once():
    untied = msgspec.structs.replace(SMOLLM2, tied_embeddings=False)
    once, twice = (base_bytes(shape, "nf4", "bf16")["embeddings and head"] for shape in (SMOLLM2, untied))
    assert once == 49152 * 576 * 2
    assert twice == 2 * once


def test_dense_base_is_its_parameters():
    assert sum(base_bytes(LLAMA_8B, "bf16", "bf16").values()) == 2 * LLAMA_8B.parameters


def test_8b_qlora_step_is_below_that_of_transformers_own_norms_and_gates():
    # With those, the same step simulated on fake tensors gives 8.289 GiB before logits.
    predicted = estimate(LLAMA_8B, device="cpu", longest=512, rank=16, micro_batch_tokens=4096)
    assert 7.5 < predicted.peak_bytes / GIB < 8.2
    assert predicted.peak.name == "train step"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_phases_are_sums_of_their_categories(device):
    predicted = estimate(SMOLLM2, device=device, longest=128)
    assert [phase.name for phase in predicted.phases] == ["load", "train step", "evaluation", "save"]
    for phase in predicted.phases:
        assert phase.total_bytes == sum(phase.bytes_by_category.values())
        assert all(isinstance(size, int) and size > 0 for size in phase.bytes_by_category.values())
    assert predicted.peak_bytes == max(phase.total_bytes for phase in predicted.phases)


def test_cpu_has_no_context_and_cuda_has_one():
    on_cpu = estimate(SMOLLM2, device="cpu", longest=128).peak
    on_card = estimate(SMOLLM2, device="cuda", longest=128).peak
    assert "device context" not in on_cpu.bytes_by_category
    assert on_card.bytes_by_category["device context"] == unseen_bytes(Target("cuda"), in_allocator=False)


def test_adapter_gradient_and_optimizer_are_float32():
    step = estimate(SMOLLM2, device="cpu", longest=64, rank=8).phases[1]
    config = LoraConfig(rank=8)
    parameters = count_parameters(config, SMOLLM2)
    assert step.bytes_by_category["adapter weights"] == 4 * parameters
    assert step.bytes_by_category["gradients"] == 4 * parameters
    steps = 2 * 4 * 7 * SMOLLM2.layers
    assert step.bytes_by_category["optimizer state"] == 8 * parameters + steps


def test_one_sample_above_the_cap_counts():
    assert peak(micro_batch_tokens=128, longest=1024) == peak(micro_batch_tokens=1024, longest=1024)


def test_gradients_of_a_lone_micro_batch_take_the_place_of_activations():
    assert peak(micro_batch_tokens=512, alone=True) < peak(micro_batch_tokens=512)


def test_checkpointing_saves_memory():
    assert peak(checkpointing="layer", micro_batch_tokens=2048) < peak(checkpointing="none", micro_batch_tokens=2048)


@given(
    rank=st.integers(1, 64),
    tokens=st.integers(1, 8192),
    longest=st.integers(1, 2048),
    layers=st.integers(1, 48),
    chunk=st.integers(1, 512),
    precision=st.sampled_from(["bf16", "int8", "nf4"]),
    checkpointing=st.sampled_from(["layer", "none"]),
    device=st.sampled_from(["cpu", "cuda"]),
    what=st.sampled_from(["rank", "tokens", "longest", "layers", "chunk"]),
    more=st.integers(1, 500),
)
def test_more_never_costs_less(rank, tokens, longest, layers, chunk, precision, checkpointing, device, what, more):
    values = {"rank": rank, "tokens": tokens, "longest": longest, "layers": layers, "chunk": chunk}

    def total(rank: int, tokens: int, longest: int, layers: int, chunk: int) -> int:
        return peak(
            llama_shape(layers=layers),
            device=device,
            longest=longest,
            rank=rank,
            micro_batch_tokens=tokens,
            loss_chunk_tokens=chunk,
            precision=precision,
            checkpointing=checkpointing,
        )

    # The flash kernel wants room behind each sample: fewer, longer ones may need less.
    assume(not (what == "longest" and device == "cuda"))
    grown = values | {what: min(64, rank + more) if what == "rank" else values[what] + more}
    # On a card the allocator's slack is that of the place with the most tensors: another one may have more slack.
    before = total(**values)
    assert total(**grown) >= before - (before // 10_000 if device == "cuda" else 0)


@pytest.mark.parametrize(("better", "leaner"), [("fp32", "bf16"), ("bf16", "int8"), ("int8", "nf4")])
def test_fewer_bits_are_smaller(better, leaner):
    held = {name: sum(base_bytes(LLAMA_8B, name, "bf16").values()) for name in (better, leaner)}
    assert held[leaner] < held[better]


def test_a_single_row_gets_no_adapter():
    gate = LinearShape("mlp.shared_expert_gate", SMOLLM2.hidden, 1)
    shape = msgspec.structs.replace(SMOLLM2, linears=(*SMOLLM2.linears, gate))
    config = LoraConfig(rank=16)
    assert method_of(config).targeted(config, shape) == SMOLLM2.linears
    assert count_parameters(config, shape) == count_parameters(config, SMOLLM2)
    with pytest.raises(UsageError, match="matches no linear"):
        method_of(config).targeted(LoraConfig(targets=("shared_expert_gate",)), shape)


def test_chat_counts_the_cache():
    # Llama-3-8B: 128 KiB a token in 16 bit.
    assert kv_cache_bytes(LLAMA_8B, 1, "bf16") == 131072
    short, long = (
        estimate_chat(LLAMA_8B, "nf4", "bf16", context_tokens=tokens, device_kind="cuda").peak_bytes
        for tokens in (1024, 8192)
    )
    assert long - short > 7168 * 131072
    assert estimate_chat(LLAMA_8B, "nf4", "bf16", context_tokens=1024, device_kind="cpu").peak.name == "chat"


def test_chat_counts_what_stands_first_and_each_adapter():
    def chat(**values):
        settings = {"context_tokens": 1024, "device_kind": "cpu"} | values
        return estimate_chat(LLAMA_8B, "nf4", "bf16", **settings)

    alone, led = chat(), chat(leading_tokens=100)
    assert led.phases[0].bytes_by_category["KV cache"] - alone.phases[0].bytes_by_category["KV cache"] == 100 * 131072
    assert led.peak_bytes == chat(context_tokens=1124).peak_bytes
    small, large = AdapterBytes(held=10**6, reading=3 * 10**6), AdapterBytes(held=10**10, reading=4 * 10**10)
    load, answers = chat(adapters=(small, small)).phases
    assert (load.name, answers.name) == ("load", "chat")
    assert load.bytes_by_category["adapter weights"] == 4 * 10**6
    assert answers.total_bytes == alone.peak_bytes + 2 * 10**6
    assert chat(adapters=(small, large)).peak.name == "load"


def test_what_an_adapter_takes_is_told_by_its_header():
    def header(name, dtype, shape):
        entries = prod(shape)
        return TensorHeader(name, dtype, shape, entries * {"F32": 4, "F16": 2, "I32": 4}[dtype], 0)

    a, b = header("lora_A", "F32", (8, 100)), header("lora_B", "F16", (50, 8))
    assert adapter_bytes([a, b], "bf16") == AdapterBytes(2 * 1200, (3200 + 3200) + (800 + 1600) + 7 * 800)
    assert adapter_bytes([a, b], "fp32").held == 4 * 1200
    # A single row or a vector stays in float32, and of DoRA's lengths there are three.
    assert adapter_bytes([header("lora_A", "F32", (1, 100)), header("norm", "F32", (50,))], "bf16").held == 600
    assert adapter_bytes([header("x.lora_magnitude_vector", "F32", (50,))], "bf16").held == 600
    assert adapter_bytes([header("shira_indices", "I32", (2, 30))], "bf16").held == 120


def test_a_full_adapter_in_part_has_a_head_formed():
    full = {"peft_type": "EDGEPEFT_FULL"}
    assert formed_head_bytes(full, 0.5, LLAMA_8B, "bf16") == 2 * LLAMA_8B.vocab * LLAMA_8B.hidden
    assert [formed_head_bytes(full, scale, LLAMA_8B, "bf16") for scale in (0, 1)] == [0, 0]
    assert formed_head_bytes({"peft_type": "LORA"}, 0.5, LLAMA_8B, "bf16") == 0


def test_70b_takes_milliseconds():
    from time import perf_counter

    shape = llama_shape(layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8, head_dim=128, vocab=128256)
    begun = perf_counter()
    for _ in range(10):
        peak(shape, micro_batch_tokens=4096)
    assert (perf_counter() - begun) / 10 < 0.05
