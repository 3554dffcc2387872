"""edgepeft: a real run in a run folder, with its probe, events and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peers.meter import Meter
from peers.task import Task


def train(task: Task, meter: Meter) -> dict[str, Any]:
    from edgepeft.engine.training.loop import run_training
    from edgepeft.engine.training.stopping import StopRequests
    from edgepeft.plan.build import build
    from edgepeft.runs.events import Finished, StepDone
    from edgepeft.runs.layout import create_run

    plan = build(task.model, Path(task.data), task.settings.plan_options(task.precision, len(task.steps)))
    run = create_run(plan, "bench")
    finished: dict[str, Any] = {}

    def emit(event: Any) -> None:
        if isinstance(event, StepDone):
            meter.step(event.loss)
            # Told by the engine itself: without the time between two steps, as the peers' steps are timed.
            meter.seconds[-1] = event.seconds
        elif isinstance(event, Finished):
            finished["live_peak_bytes"] = event.live_peak_bytes
            finished["bound_bytes"] = lower_bound_bytes(plan)

    meter.begin()
    meter.ready()
    run_training(run, emit, StopRequests(run))
    meter.end()
    return finished | {"adapter": str(run.adapter)}


def lower_bound_bytes(plan: Any) -> int:
    """What no layout of this kind can go below: states, the inputs of checkpointed layers, and one layer.

    States are the frozen base, the adapter, its gradients and the optimizer's; one layer is what it keeps for its own
    backward. All are rows of the plan's ledger.
    """
    step = next(phase for phase in plan.memory.phases if phase.name == "train step")
    outside = ("logits and loss", "device context", "allocator slack")
    return sum(size for category, size in step.bytes_by_category.items() if category not in outside)
