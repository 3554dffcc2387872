"""A run keeps within its budget, or within what is free when it starts, if that is less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edgepeft.engine.training import limit as limit_module
from edgepeft.engine.training.limit import limit_memory, limit_of
from edgepeft.engine.training.opening import base_too_large
from edgepeft.errors import DoesNotFit, OutOfMemory
from edgepeft.memory.breakdown import Breakdown, Phase
from edgepeft.plan.device import GPU_MARGIN_BYTES
from edgepeft.runs.events import Event, Finished, OutOfMemoryHit, Warned
from edgepeft.units import GIB, MIB
from training_runs import of_type, tiny_base, tiny_plan, tiny_run, train

CARD = Breakdown((Phase("train step", {"frozen weights": 4 * GIB, "device context": 450 * MIB}),))


def test_enough_is_free() -> None:
    found = limit_of(8 * GIB, 8 * GIB, 384 * MIB, "the card")
    assert (found.limit_bytes, found.lowered, found.warning) == (8 * GIB, False, "")
    assert limit_of(None, 1, 384 * MIB, "the card").limit_bytes is None


def test_less_is_free_than_was_planned() -> None:
    found = limit_of(8 * GIB, 7 * GIB, 384 * MIB, "Some Card")
    assert found.limit_bytes == 7 * GIB - 384 * MIB
    assert found.lowered
    assert "7.00 GiB are free on Some Card, less than the 8.00 GiB of the plan" in found.warning
    assert "keeps within 6.62 GiB" in found.warning
    assert limit_of(8 * GIB, 10 * MIB, 384 * MIB, "Some Card").limit_bytes == 0


@pytest.mark.parametrize(
    ("budget", "free", "expected"),
    [
        (8 * GIB, 20 * GIB, 8 * GIB - 450 * MIB),
        (8 * GIB, 6 * GIB, 6 * GIB - GPU_MARGIN_BYTES),
        (None, 20 * GIB, 20 * GIB),
    ],
)
def test_the_allocator_of_a_card_is_limited_without_its_context(
    monkeypatch: pytest.MonkeyPatch, budget: int | None, free: int, expected: int
) -> None:
    fractions: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card")
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda fraction, device: fractions.append(fraction)
    )
    limit_memory(budget, CARD, torch.device("cuda"))
    assert fractions == pytest.approx([expected / (24 * GIB)])


def test_a_run_that_finds_less_memory_than_planned_says_so_and_shrinks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(tmp_path)
    options: dict[str, Any] = {"checkpointing": "none", "micro_batch_tokens": 400, "max_steps": 2}
    free_run = tiny_run(tmp_path, base, "free", **options, budget_bytes=GIB)
    peak = of_type(train(free_run), Finished)[0].measured_peak_bytes

    class Host:
        ram_available_bytes = int(0.6 * peak) + limit_module.CPU_MARGIN_BYTES

    monkeypatch.setattr(limit_module, "read_host", Host)
    events: list[Event] = train(tiny_run(tmp_path, base, "tight", **options, budget_bytes=GIB))
    assert "less than the 1.00 GiB of the plan" in of_type(events, Warned)[0].message
    assert of_type(events, OutOfMemoryHit)[0].phase == "probe"
    assert of_type(events, Finished)[0].measured_peak_bytes <= 0.6 * peak


def test_what_is_said_when_the_base_alone_is_too_large(tmp_path: Path) -> None:
    recipe = tiny_plan(tmp_path, tiny_base(tmp_path)).spec.recipe
    budget = base_too_large("m", recipe, limit_of(8 * GIB, 9 * GIB, 0, "x"), "")
    assert isinstance(budget, DoesNotFit)
    assert "8.00 GiB of the run's budget" in str(budget)
    lowered = base_too_large("m", recipe, limit_of(8 * GIB, 4 * GIB, 0, "x"), "CUDA out of memory.")
    assert isinstance(lowered, OutOfMemory)
    assert "more memory than the 4.00 GiB that it may take now" in str(lowered)
    none = base_too_large("m", recipe, limit_of(None, 4 * GIB, 0, "x"), "CUDA out of memory.")
    assert isinstance(none, OutOfMemory)
    assert "while it is loaded (CUDA out of memory)" in str(none)
