"""The dry run against the real step on the CPU: small real models, real training steps, the allocator's own events.

What exists before a phase is counted from its storages; what comes and goes in it is read from the memory events of
torch's profiler. Scratch that a matrix product takes and frees before it returns is no tensor and depends on the
processor (oneDNN: none that torch sees with AMX, up to 3.4 MiB on Zen 5); it is told in a column of its own.
"""

from __future__ import annotations

import gc
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from edgepeft.engine.methods import attach, set_active
from edgepeft.engine.model.load import LoadedModel, load_model
from edgepeft.engine.simulate import dry_run
from edgepeft.engine.simulate.step import UnwatchedGauge
from edgepeft.engine.training.batches import Sample
from edgepeft.engine.training.optimizer import make_optimizer
from edgepeft.engine.training.step import StepRunner
from edgepeft.memory.dry_run import DryRunRequest
from edgepeft.memory.target import CPU
from edgepeft.memory.workload import Workload
from edgepeft.methods import LoraConfig, id_of
from edgepeft.models.store import ensure_model
from edgepeft.plan.reasons import method_values
from edgepeft.spec import BaseRef, DataRef, Layout, Recipe, RunSpec

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 300},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 64},
    "gemma2": {"head_dim": 32, "sliding_window": 200},
    "gemma3_text": {"head_dim": 32, "sliding_window": 128, "sliding_window_pattern": 3},
    "phi3": {},
    "smollm3": {},
    "olmo2": {},
    "granite": {},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 64, "head_dim": 32},
}
MIXTURES = ("mixtral", "qwen3_moe")
CASES, QUICK_CASES = 52, 10


class Case(msgspec.Struct, frozen=True):
    """One configuration."""

    family: str
    spec: RunSpec
    workload: Workload
    layers: int
    hidden: int
    vocab: int


def measure(seed: int, quick: bool) -> list[dict[str, Any]]:
    """Rows of configuration, phase, `predicted_bytes`, `measured_bytes` and `error` = predicted / measured - 1."""
    return [row for case in draw(seed, QUICK_CASES if quick else CASES) for row in rows(case)]


def draw(seed: int, count: int) -> list[Case]:
    """Configurations, every family and precision in turn, beginning at the seed, and the rest by chance."""
    chance = random.Random(seed)
    precisions = ("nf4", "int8", "bf16", "fp32")
    return [
        _case(chance, list(FAMILIES)[number % len(FAMILIES)], precisions[number % len(precisions)])
        for number in range(seed, seed + count)
    ]


def rows(case: Case) -> list[dict[str, Any]]:
    """Loads, trains a step and evaluates, simulates all that, and compares each phase."""
    torch.manual_seed(0)
    config = model_config(case)
    predicted = dry_run(DryRunRequest(case.spec, config.to_dict(), case.workload, CPU))
    with tempfile.TemporaryDirectory(prefix="edgepeft-model-") as folder:
        measured = real_peaks(case, config, Path(folder))
    recipe, layout, workload = case.spec.recipe, case.spec.layout, case.workload
    described = {
        "family": case.family,
        "layers": case.layers,
        "hidden": case.hidden,
        "vocab": case.vocab,
        "precision": recipe.precision,
        "compute": recipe.compute_dtype,
        "method": id_of(recipe.method),
        "settings": ", ".join(f"{name} {value}" for name, value in method_values(recipe.method).items()),
        "tokens": workload.tokens,
        "longest": workload.longest,
        "trained": workload.trained,
        "alone": workload.alone,
        "checkpointing": layout.checkpointing,
        "chunk": layout.loss_chunk_tokens,
        "simulated": "+".join(map(str, predicted.simulated)),
    }
    return [
        {
            **described,
            "phase": phase.name,
            "place": phase.place,
            "predicted_bytes": phase.total_bytes,
            "measured_bytes": measured[phase.name].bytes,
            "scratch_bytes": measured[phase.name].scratch_bytes,
            "error": phase.total_bytes / measured[phase.name].bytes - 1,
        }
        for phase in predicted.memory.phases
        if phase.name in measured
    ]


def model_config(case: Case) -> Any:
    """transformers' config of a case."""
    return AutoConfig.for_model(
        case.family,
        hidden_size=case.hidden,
        intermediate_size=case.hidden * 11 // 4 // 32 * 32,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 32,
        num_key_value_heads=case.hidden // 64,
        vocab_size=case.vocab,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
        **FAMILIES[case.family],
    )


class Peak(NamedTuple):
    """What was measured of a phase."""

    bytes: int
    """Live at its highest point."""
    scratch_bytes: int
    """The most that one matrix product took inside."""


def real_peaks(case: Case, config: Any, folder: Path) -> dict[str, Peak]:
    """Live bytes at the highest point of loading, of a step that is not the first, and of an evaluation."""
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    _write_tokenizer(folder)
    recipe, layout, workload = case.spec.recipe, case.spec.layout, case.workload
    entry = ensure_model(str(folder))
    peaks: dict[str, Peak] = {}
    # The profiler takes a file that is mapped into memory for an allocation.
    with _following(peaks, "load", -(folder / "model.safetensors").stat().st_size):
        loaded = load_model(
            entry, precision=recipe.precision, compute_dtype=recipe.compute_dtype, device=torch.device("cpu")
        )
    adapter = attach(loaded, "training", recipe.method, 0)
    set_active(loaded, [("training", 1.0)])
    parameters = list(adapter.named_parameters().values())
    optimizer = make_optimizer(adapter.named_parameters(), recipe.optimizer)
    runner = StepRunner(loaded, recipe, backward=lambda loss: loss.backward(), gauge=UnwatchedGauge(loaded.device))

    def update() -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        torch._foreach_mul_(gradients, 1 / (float(norm) + 1e-6))
        optimizer.step()

    def existing() -> int:
        return _storage_bytes(_existing(loaded, recipe.precision, parameters, optimizer))

    runner.train(_samples((9,), 9, case.vocab), layout, 0)
    update()
    if workload.alone:
        optimizer.zero_grad(set_to_none=True)
    samples = _samples(workload.lengths(), workload.trained, case.vocab)
    with _following(peaks, "train step", existing()):
        runner.train(samples, layout, 1)
        update()
    optimizer.zero_grad(set_to_none=True)
    samples = _samples(workload.held_out_lengths(), workload.held_out_trained, case.vocab)
    # The held-out micro-batch is one, however large it was drawn.
    roomy = msgspec.structs.replace(layout, micro_batch_tokens=max(workload.tokens, workload.held_out_tokens))
    with _following(peaks, "evaluation", existing()):
        runner.evaluate(samples, roomy)
    return peaks


@contextmanager
def _following(peaks: dict[str, Peak], phase: str, existing_bytes: int) -> Iterator[None]:
    # Whatever earlier work left in cycles must not die in between: it would count as freed by this phase.
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield
    changes, scratch_bytes = _changes(profiler)
    peaks[phase] = Peak(existing_bytes + _highest(changes), scratch_bytes)


def _existing(
    loaded: LoadedModel, precision: str, parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> Iterable[Tensor]:
    for tensors in loaded.tensors_by_category().values():
        yield from tensors
    yield loaded.workspace.borrow((1, 1))
    if precision == "nf4":
        yield loaded.workspace.dynamic_map
    for parameter in parameters:
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
        yield from optimizer.state[parameter].values()


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmm_", "aten::mv"})


def _changes(profiler: Any) -> tuple[list[int], int]:
    """Bytes of each birth and each death of a tensor, in order, and the most that one product took inside."""
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes: list[int] = []
    within, inside_until, scratch = 0, -1, 0
    for event in events:
        if event.name() in PRODUCTS:
            within, inside_until = len(changes), max(inside_until, event.start_ns() + event.duration_ns())
        elif event.name() == "[memory]":
            size = event.nbytes()
            if size < 0 and event.start_ns() <= inside_until and -size in changes[within:]:
                # Taken and freed by the same product.
                del changes[within + changes[within:].index(-size)]
                scratch = max(scratch, -size)
            else:
                changes.append(size)
    return changes, scratch


def _highest(changes: Iterable[int]) -> int:
    live = highest = 0
    for change in changes:
        live += change
        highest = max(highest, live)
    return highest


def _samples(lengths: Sequence[int], trained: int, vocab: int) -> list[Sample]:
    chance = np.random.default_rng(0)
    samples = []
    for number, length in enumerate(lengths):
        rows = np.arange(min(length, trained))
        trained -= rows.size
        ids = chance.integers(3, vocab, length).astype(np.int32)
        samples.append(Sample(number, ids, rows, chance.integers(3, vocab, rows.size)))
    return samples


def _case(chance: random.Random, family: str, precision: Any) -> Case:
    longest = chance.choice((40, 150, 256, 400, 600))
    tokens = longest * chance.choice((1, 1, 2)) + chance.choice((0, 17))
    trained = chance.choice((tokens, tokens // 2, tokens // 8))
    held_out = chance.choice((tokens, 30, 500))
    rank, targets = (
        chance.choice((2, 8, 16, 32)),
        chance.choice((("all-linear",), ("o_proj", "down_proj"), ("o_proj",))),
    )
    method = LoraConfig(
        rank=rank,
        # A mixture's experts are no linears.
        targets=("o_proj",) if "down_proj" in targets and family in MIXTURES else targets,
        dropout=chance.choice((0.0, 0.0, 0.1)),
    )
    recipe = Recipe(
        base=BaseRef("model", "sha256:0", family),
        data=DataRef("", "", ""),
        method=method,
        precision=precision,
        compute_dtype="fp32" if precision == "fp32" else chance.choice(("bf16", "bf16", "fp32")),
        max_seq_len=longest,
        samples_per_step=8,
    )
    layout = Layout(
        micro_batch_tokens=tokens,
        checkpointing=chance.choice(("layer", "none")),
        loss_chunk_tokens=chance.choice((32, 128, 256)),
    )
    return Case(
        family,
        RunSpec(recipe, layout),
        Workload(
            tokens,
            longest,
            trained,
            alone=chance.random() < 0.4,
            held_out_tokens=held_out,
            held_out_longest=min(held_out, longest),
            held_out_trained=held_out // 2,
        ),
        layers=chance.choice((2, 4, 6, 9)),
        hidden=chance.choice((128, 192, 256)),
        vocab=chance.choice((800, 5000, 12000)),
    )


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(folder / "tokenizer.json"))
