"""Starts the process that combines adapters, and publishes what it made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import msgspec

from edgepeft.library.combined_card import adapter_config, combined_card
from edgepeft.library.combining import Combined, CombineRequest, PartTensors, Plan
from edgepeft.library.store import CONFIG_FILE, WEIGHTS_FILE, AdapterFolder, publish, resolve_adapter
from edgepeft.models.headers import read_header
from edgepeft.paths import home, make_folder, temporary_folder, write_atomic
from edgepeft.processes import Progress, Task, run_task


def combine(
    plan: Plan, command: Literal["composed", "averaged"], progress: Progress | None = None
) -> tuple[AdapterFolder, Combined]:
    """Combines adapters and publishes the result as the next version of the plan's name.

    Args:
        plan: of `plan_combination`.
        command: what the audit says was done.
        progress: told how far it is.

    Returns:
        The new version, and what the engine found.

    Raises:
        BadInput: a tensor is damaged or not finite, or the updates cancel each other.
        DiskProblem: the disk is full, or may not be written.
    """
    # In the cache, which a command clears should it be left behind.
    root = home().cache / "combining"
    make_folder(root)
    with temporary_folder(root) as work:
        question = msgspec.json.encode(request_for(plan, work / WEIGHTS_FILE))
        task = Task("combine", "the combination", "combine", (), question, "Combine fewer adapters at once")
        made = run_task(task, Combined, progress)
        config = adapter_config(plan, made.ranks)
        write_atomic(work / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
        card = combined_card(plan, command, made, read_header(work / WEIGHTS_FILE))
        return resolve_adapter(publish(work, plan.name, card)), made


def request_for(plan: Plan, weights_file: Path) -> CombineRequest:
    """What the engine is asked for, with the result going to `weights_file`."""
    return CombineRequest(
        parts=tuple(
            PartTensors(
                name=part.adapter.reference,
                weights_file=str(part.adapter.weights),
                weight=part.weight,
                pairs={paths[path]: pair for path, pair in part.pairs.items()},
            )
            for part, paths in zip(plan.parts, plan.paths, strict=True)
        ),
        how=plan.how,
        rank=plan.rank,
        density=plan.density,
        seed=plan.seed or 0,
        weights_file=str(weights_file),
    )
