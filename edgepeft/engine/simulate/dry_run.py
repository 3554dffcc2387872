"""From a request to a ledger: simulates few layers, extrapolates where layers repeat, adds what a card holds beside."""

from __future__ import annotations

import time
from typing import Any

import torch

from edgepeft.engine.model.frozen import dynamic_values
from edgepeft.engine.simulate.allocator import CachingAllocator
from edgepeft.engine.simulate.layers import extrapolated, few_layers
from edgepeft.engine.simulate.model import layer_count, layer_period, read_config, with_layers
from edgepeft.engine.simulate.replay import replay, replay_repeated
from edgepeft.engine.simulate.step import Peaks, SimulatedRun, simulate
from edgepeft.engine.training.adamw8bit import map_values
from edgepeft.errors import UsageError
from edgepeft.memory.breakdown import Breakdown, Category, Phase, PhaseName
from edgepeft.memory.dry_run import DryRun, DryRunRequest
from edgepeft.memory.target import Target
from edgepeft.memory.unseen import unseen
from edgepeft.memory.workload import Workload

MOST_TOKENS = 1 << 24
"""More tokens in a micro-batch are a mistake in the request."""


def dry_run(request: DryRunRequest) -> DryRun:
    """Executes one training step, an evaluation and a save of `request` on tensors without values.

    Raises:
        BadInput: the config is of no model that can be made and trained.
        UsageError: the workload is impossible, or the method does not suit the model.
    """
    # Imports a library, and has it compute what fake tensors cannot; afterwards it is remembered.
    dynamic_values()
    if request.spec.recipe.optimizer.name == "adamw8bit":
        map_values(signed=True), map_values(signed=False)
    began = time.perf_counter()
    check_workload(request.workload)
    config = read_config(request.config)
    layers, period = layer_count(config), layer_period(config)
    counts = None if request.full else few_layers(layers, period)
    runs, reserved = _few(config, counts, layers, period, request) if counts is not None else ([], None)
    if reserved is None:
        runs = [_simulated(config, layers, request, period)]
        reserved = _reserved(runs, layers, period, request.target) or {}
    phases = [
        _phase(name, _peaks(runs, name, layers, period), reserved.get(name), request.target) for name in runs[0].phases
    ]
    return DryRun(
        memory=Breakdown(tuple(phases)),
        layers=layers,
        simulated=tuple(run.layers for run in runs),
        seconds=time.perf_counter() - began,
        torch=str(torch.__version__),
        device=_device(request.target),
    )


def check_workload(workload: Workload) -> None:
    """Refuses what no micro-batch can be.

    Raises:
        UsageError: naming the number that is wrong.
    """
    for what, tokens, longest, trained, samples in (
        ("micro-batch", workload.tokens, workload.longest, workload.trained, workload.samples),
        (
            "held-out micro-batch",
            workload.held_out_tokens,
            workload.held_out_longest,
            workload.held_out_trained,
            workload.held_out_samples,
        ),
    ):
        if what == "held-out micro-batch" and not tokens:
            continue
        if not 1 <= tokens <= MOST_TOKENS:
            raise UsageError(f"a {what} of {tokens} tokens is not possible", hint=f"Use 1 to {MOST_TOKENS:,}")
        if not 1 <= longest <= tokens or not 0 <= trained <= tokens:
            raise UsageError(
                f"a {what} of {tokens} tokens cannot have a sample of {longest} and {trained} trained ones",
                hint="Neither can be more than its tokens",
            )
        if not 0 <= samples <= tokens - longest + 1:
            raise UsageError(
                f"a {what} of {tokens} tokens cannot have {samples} samples, the longest of {longest}",
                hint="Each has a token",
            )


def _simulated(config: Any, layers: int, request: DryRunRequest, period: int) -> SimulatedRun:
    return simulate(with_layers(config, layers), layers, request, period=period)


def _peaks(runs: list[SimulatedRun], name: PhaseName, layers: int, period: int) -> Peaks:
    if len(runs) == 1:
        return runs[0].phases[name]
    one, other = runs
    return extrapolated(one.phases[name], other.phases[name], (one.layers, other.layers), layers, period)


def _few(
    config: Any, counts: tuple[int, int], layers: int, period: int, request: DryRunRequest
) -> tuple[list[SimulatedRun], dict[PhaseName, int] | None]:
    """Runs with few layers, and what the whole model reserves; None for that where its layers are not alike."""
    runs = [_simulated(config, count, request, period) for count in counts]
    regular = all(run.regular for run in runs)
    return runs, _reserved(runs, layers, period, request.target) if regular else None


def _reserved(runs: list[SimulatedRun], layers: int, period: int, target: Target) -> dict[PhaseName, int] | None:
    """What the CUDA allocator holds from the driver at the most in each phase; nothing on the CPU.

    None where the traces of `runs` cannot be repeated.
    """
    if target.kind == "cpu":
        return {}
    if len(runs) == 1:
        return replay(runs[0].recording, _allocator(target))
    return replay_repeated(runs[0].recording, runs[1].recording, layers, period, _allocator(target))


def _allocator(target: Target) -> CachingAllocator:
    allocator = CachingAllocator(target.expandable_segments)
    for number, row in enumerate(unseen(target), 1):
        if row.in_allocator:
            allocator.born(-number, row.size_bytes)
    return allocator


def _phase(name: PhaseName, peaks: Peaks, reserved: int | None, target: Target) -> Phase:
    place, ledger = max(peaks.items(), key=lambda item: sum(item[1].values()))
    ledger = dict(ledger)
    outside = 0
    for row in unseen(target):
        ledger[row.category] = ledger.get(row.category, 0) + row.size_bytes
        outside += 0 if row.in_allocator else row.size_bytes
    if reserved is None:
        return Phase(name, _without_zeros(ledger), place)
    # What the allocator has taken from the driver and tensors do not fill.
    ledger["allocator slack"] = max(0, outside + reserved - sum(ledger.values()))
    return Phase(name, _without_zeros(ledger), place, reserved_bytes=sum(ledger.values()))


def _without_zeros(ledger: dict[Category, int]) -> dict[Category, int]:
    return {category: size for category, size in ledger.items() if size}


def _device(target: Target) -> str:
    if target.kind == "cpu":
        return "cpu"
    capability = "" if target.capability is None else f" {target.capability[0]}.{target.capability[1]}"
    return f"cuda{capability}, on fake CPU tensors"
