"""A tiny base, tiny data and a plan over them, for tests of training."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edgepeft.data.prepare import describe_data
from edgepeft.memory.breakdown import Breakdown, Phase
from edgepeft.methods import LoraConfig
from edgepeft.models.store import ModelEntry, add_model
from edgepeft.plan.train_plan import TrainPlan
from edgepeft.runs.events import Event
from edgepeft.runs.layout import RunFolder, create_run
from edgepeft.spec import BaseRef, Layout, Optimizer, Recipe, RunSpec, Schedule, Upkeep
from tiny import write_tiny_model

Kind = TypeVar("Kind")


def write_data(path: Path, count: int = 26) -> Path:
    """Questions with answers of very unequal lengths, in the prompt-completion form."""
    lines = [
        json.dumps({"prompt": f"Count to {n}", "completion": " ".join(str(k) for k in range(1 + (n * 7) % 23))})
        for n in range(count)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tiny_base(folder: Path, **changes: Any) -> ModelEntry:
    """A tiny model in the store."""
    return add_model(write_tiny_model(folder / "tiny-model", **changes))


def tiny_plan(folder: Path, entry: ModelEntry, **changes: Any) -> TrainPlan:
    """A plan of a few steps in float32; `changes` go into the recipe, the layout, the upkeep or the run's budget."""
    data = write_data(folder / "data.jsonl")
    recipe: dict[str, Any] = {
        "base": BaseRef(model=entry.name, fingerprint=entry.fingerprint, architecture=entry.shape.architecture),
        "data": describe_data(data, eval_fraction=0.2),
        "method": LoraConfig(rank=4, alpha=8.0),
        "precision": "fp32",
        "compute_dtype": "fp32",
        "max_seq_len": 512,
        "samples_per_step": 5,
        "max_steps": 6,
        "epochs": 4.0,
        "optimizer": Optimizer(learning_rate=5e-3),
        "schedule": Schedule(warmup_fraction=0.2),
        "seed": 3,
    }
    layout: dict[str, Any] = {"micro_batch_tokens": 160, "loss_chunk_tokens": 16}
    upkeep: dict[str, Any] = {}
    for name, value in changes.items():
        for kind, values in ((Recipe, recipe), (Layout, layout), (Upkeep, upkeep)):
            if name in kind.__struct_fields__:
                values[name] = value
    spec = RunSpec(
        recipe=Recipe(**recipe),
        layout=Layout(**layout),
        upkeep=Upkeep(**upkeep),
        budget_bytes=changes.get("budget_bytes"),
    )
    memory = Breakdown(phases=(Phase(name="train step", bytes_by_category={"adapter weights": 1 << 16}),))
    return TrainPlan(spec=spec, choices=(), memory=memory, steps=spec.recipe.max_steps or 1)


def tiny_run(folder: Path, entry: ModelEntry, name: str = "tiny", **changes: Any) -> RunFolder:
    """A run folder with such a plan."""
    return create_run(tiny_plan(folder, entry, **changes), name)


def train(run: RunFolder, hook: Callable[[Event], None] = lambda event: None, **options: Any) -> list[Event]:
    """Executes the run in this process, `hook` being told each event; returns them."""
    from edgepeft.engine.training.loop import run_training
    from edgepeft.engine.training.stopping import StopRequests

    events: list[Event] = []

    def emit(event: Event) -> None:
        events.append(event)
        hook(event)

    # As the worker does: what earlier tests left behind is not the run's, and looking at it takes long.
    gc.freeze()
    try:
        run_training(run, emit, StopRequests(run), **options)
    finally:
        gc.unfreeze()
    return events


def of_type(events: list[Event], kind: type[Kind]) -> list[Kind]:
    """The events of one type."""
    return [event for event in events if isinstance(event, kind)]


def change_layout(run: RunFolder, **changes: Any) -> None:
    """Writes another layout into plan.json."""
    plan = run.read_plan()
    layout = msgspec.structs.replace(plan.spec.layout, **changes)
    spec = msgspec.structs.replace(plan.spec, layout=layout)
    run.plan_file.write_bytes(msgspec.json.encode(msgspec.structs.replace(plan, spec=spec)))
