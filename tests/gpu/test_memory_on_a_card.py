"""On a CUDA card: what a run allocates and reserves there, against its dry run."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from edgepeft.memory.dry_run import DryRunRequest
from edgepeft.memory.target import Target
from edgepeft.memory.unseen import unseen_bytes
from edgepeft.models.store import ensure_model
from edgepeft.plan.build import build
from edgepeft.plan.simulated import read_config
from edgepeft.plan.train_plan import TrainPlan
from edgepeft.plan.verify import dry_run
from edgepeft.processes import start_worker
from edgepeft.runs.events import Finished
from edgepeft.runs.events_file import read_events
from edgepeft.runs.layout import create_run
from edgepeft.units import format_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
MODEL = "smollm2-135m"


def write_long_data(path: Path) -> Path:
    """Questions with answers of some ten to some five hundred tokens."""
    lines = [
        json.dumps({"prompt": f"Count to {n}.", "completion": " ".join(map(str, range(1 + n * 37 % 251)))})
        for n in range(64)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def predicted_bytes(plan: TrainPlan, target: Target) -> tuple[int, int]:
    """What torch's allocator will hand out, and what it will hold from the driver."""
    assert plan.workload is not None
    config = read_config(Path(ensure_model(MODEL).folder))
    memory = dry_run(DryRunRequest(plan.spec, config, plan.workload, target)).memory
    outside = unseen_bytes(target, in_allocator=False)
    allocated = max(
        phase.total_bytes - phase.bytes_by_category.get("allocator slack", 0) - outside for phase in memory.phases
    )
    return allocated, max(phase.reserved_bytes or 0 for phase in memory.phases) - outside


def trained(plan: TrainPlan) -> Finished:
    """The end of the run of a plan, in a worker of its own."""
    run = create_run(plan, "card")
    worker = start_worker(
        "train", [str(run.path)], device=plan.spec.device, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    assert worker.wait() == 0, read_events(run.events_file)[-1]
    return next(event for event in read_events(run.events_file) if isinstance(event, Finished))


@pytest.mark.parametrize("expandable", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"precision": "nf4", "checkpointing": "layer"},
        {"precision": "bf16", "checkpointing": "none"},
        {"precision": "int8", "checkpointing": "layer", "rank": 64},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_a_run_takes_what_its_dry_run_says(
    options: dict[str, Any], expandable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if expandable and os.name == "nt":
        pytest.skip("Windows has no expandable segments")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", f"expandable_segments:{expandable}")
    typed = {"gpu": "0", "max_steps": 3, "micro_batch_tokens": 4096, **options}
    plan = build(MODEL, write_long_data(tmp_path / "long.jsonl"), typed)
    target = Target("cuda", torch.cuda.get_device_capability(), expandable)
    allocated, reserved = predicted_bytes(plan, target)
    # A budget would have the allocator give memory back that it would keep otherwise.
    finished = trained(msgspec.structs.replace(plan, spec=msgspec.structs.replace(plan.spec, budget_bytes=None)))
    measured, held = finished.live_peak_bytes, finished.reserved_peak_bytes
    assert measured is not None
    assert held is not None
    for what, prediction, found in (("allocated", allocated, measured), ("reserved", reserved, held)):
        print(
            f"{options} expandable={expandable} {what}: predicted {format_bytes(prediction)}, "
            f"measured {format_bytes(found)} ({prediction / found - 1:+.1%})"
        )
    assert allocated == pytest.approx(measured, rel=0.03)
    assert reserved == pytest.approx(held, rel=0.06)
