"""Run folders as a worker leaves them, written through the real codec: what the Train screen is tested with.

Times are fixed, so that pictures of them do not change; nobody holds their locks unless a test does.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

import msgspec

from edgepeft.memory.breakdown import Breakdown, Phase
from edgepeft.plan.train_plan import TrainPlan
from edgepeft.runs.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    Finished,
    MemoryMeasured,
    OutOfMemoryHit,
    PhaseChanged,
    Recovered,
    SampleGenerated,
    Started,
    StepDone,
    Warned,
)
from edgepeft.runs.events_file import encode_event
from edgepeft.runs.layout import RunFolder, create_run
from edgepeft.units import GIB
from toy_run import toy_plan

BEGAN = 1_760_000_000.0
"""When every recorded run began: 2025-10-09 08:53:20 UTC."""
PREDICTED = round(11.1 * GIB)
BUDGET = round(22.3 * GIB)
PROMPT = "Alert: remaining connection slots are reserved (orders)"
ANSWER = '{"system": "database", "severity": "critical", "cause": "connection_exhaustion"}'


def card_plan(steps: int) -> TrainPlan:
    """A plan of `steps` steps that is predicted to take half of a 24 GiB card."""
    plan = toy_plan(steps)
    recipe = msgspec.structs.replace(
        plan.spec.recipe, base=msgspec.structs.replace(plan.spec.recipe.base, model="llama-3.1-8b")
    )
    peak = Phase("train step", {"frozen weights": PREDICTED - GIB, "saved activations": GIB})
    return msgspec.structs.replace(
        plan,
        spec=msgspec.structs.replace(plan.spec, recipe=recipe, budget_bytes=BUDGET),
        memory=Breakdown((peak,), uncertainty=0.03),
    )


def step(number: int, steps: int, seconds: float = 1.0, worse: float = 0.0) -> StepDone:
    """A step of a run that learns, with the figures of a card."""
    wave = 0.06 * math.sin(number * 1.7) + 0.04 * math.sin(number * 0.31)
    return StepDone(
        time=BEGAN + 30 + number * seconds,
        step=number,
        loss=2.1 * math.exp(-6 * number / steps) + 0.3 + worse + wave,
        learning_rate=2e-4 * min(1.0, 20 * number / steps) * (1 - number / steps * 0.9),
        grad_norm=0.8 + 0.3 * math.sin(number * 0.9) + 2 * math.exp(-number / 20),
        tokens=4096,
        trained_tokens=2000,
        seconds=seconds,
        tokens_per_second=4096 / seconds,
        live_bytes=round((9.6 + 0.3 * math.sin(number * 0.5)) * GIB),
        peak_bytes=round((10.9 - 0.8 * math.exp(-number / 8)) * GIB),
        rss_bytes=2 * GIB,
        eta_seconds=(steps - number) * seconds,
        power_watts=181.0,
        energy_wh=number * seconds * 181 / 3600,
    )


def beginning(steps: int, at_step: int = 0, time: float = BEGAN) -> list[Event]:
    """What a worker says before its first step."""
    return [
        Started(time=time, step=at_step, steps=steps, device="NVIDIA GeForce RTX 4090", versions={"torch": "2.13.0"}),
        PhaseChanged(time=time + 1, name="load", detail="llama-3.1-8b", fraction=0.5),
        PhaseChanged(time=time + 20, name="data"),
        PhaseChanged(time=time + 25, name="train"),
    ]


def steps_between(first: int, last: int, steps: int, every: int = 50, worse: float = 0.0) -> list[Event]:
    """Steps, with an evaluation, a sample and a checkpoint every `every`."""
    events: list[Event] = []
    for number in range(first, last + 1):
        done = step(number, steps, worse=worse)
        events.append(done)
        if number in (1, 2, 5):
            events.append(
                MemoryMeasured(
                    time=done.time,
                    step=number,
                    phase="train step",
                    live_bytes=done.live_bytes or 0,
                    peak_bytes=done.peak_bytes or 0,
                    by_category={"frozen weights": PREDICTED - GIB},
                )
            )
        if number % every == 0:
            loss = 2.0 * math.exp(-6 * number / steps) + 0.32 + worse
            events += [
                Evaluated(time=done.time, step=number, loss=loss, samples=64, trained_tokens=900, best=True),
                SampleGenerated(time=done.time, step=number, prompt=PROMPT, answer=ANSWER),
                CheckpointSaved(time=done.time, step=number, path=f"checkpoints/{number:06d}"),
            ]
    return events


def ending(steps: int, published: str = "") -> Finished:
    """How a run ends that did all of its steps."""
    return Finished(
        time=BEGAN + 40 + steps,
        step=steps,
        adapter="adapter",
        train_seconds=float(steps),
        tokens_per_second=4096.0,
        predicted_peak_bytes=PREDICTED,
        measured_peak_bytes=round(10.9 * GIB),
        train_loss=0.31,
        eval_loss=0.297,
        base_eval_loss=2.41,
        kept_step=steps,
        published=published,
        energy_wh=steps * 181 / 3600,
        energy_of="card and CPU package",
        co2_grams=steps * 181 / 3600 * 0.445,
        co2_grams_per_kwh=445.0,
    )


def write_run(
    name: str, plan: TrainPlan, events: Iterable[Event], *, made: float = BEGAN, torn: bytes = b""
) -> RunFolder:
    """A run folder with these events; `torn` is what a kill left of the line after them."""
    run = create_run(plan, name)
    run.events_file.write_bytes(b"".join(encode_event(event) for event in events) + torn)
    os.utime(run.plan_file, (made, made))
    return run


def finished(name: str = "net-triage", steps: int = 200, made: float = BEGAN) -> RunFolder:
    """A run that went well and published its adapter."""
    events = [*beginning(steps), *steps_between(1, steps, steps), ending(steps, f"{name}@v1")]
    run = write_run(name, card_plan(steps), events, made=made)
    run.log_file.write_text("Loading the model\nnothing to remark\n")
    return run


def out_of_memory_then_recovered(name: str = "db-triage", upto: int = 412, made: float = BEGAN + 60) -> RunFolder:
    """A run of 900 steps that ran out of memory in step 88 and went on; it has no ending."""
    steps = 900
    events = [
        *beginning(steps),
        *steps_between(1, 87, steps),
        OutOfMemoryHit(time=BEGAN + 118, step=88, phase="train step", micro_batch_tokens=4096, message="CUDA OOM"),
        Recovered(
            time=BEGAN + 118.1,
            step=88,
            what="micro-batches of at most 2048 tokens",
            micro_batch_tokens=2048,
            checkpointing="layer",
        ),
        *steps_between(88, upto, steps),
        Warned(time=BEGAN + 31 + upto, step=upto, message="1 sample was longer than the plan's max-seq-len"),
    ]
    return write_run(name, card_plan(steps), events, made=made)


def killed_mid_line(name: str = "ads-long", at: int = 77, made: float = BEGAN + 30) -> RunFolder:
    """A run whose worker was killed while it wrote, after it had been resumed once; one line of it is broken."""
    steps = 300
    line = encode_event(step(at + 1, steps))
    events = [*beginning(steps), *steps_between(1, 60, steps)]
    run = write_run(name, card_plan(steps), events, made=made, torn=line[: len(line) // 2])
    again = [*beginning(steps, at_step=50, time=BEGAN + 200), *steps_between(51, at, steps)]
    with run.events_file.open("ab") as file:
        file.write(b"\n" + b"".join(encode_event(event) for event in again) + line[: len(line) // 2])
    return run


def ten_thousand_steps(name: str = "long", made: float = BEGAN + 90) -> RunFolder:
    """A run of ten thousand steps."""
    steps = 10_000
    events = [*beginning(steps), *steps_between(1, steps, steps, every=500), ending(steps, f"{name}@v1")]
    return write_run(name, card_plan(steps), events, made=made)


def two_runs() -> tuple[RunFolder, RunFolder]:
    """A finished run and one of twice as many steps that learned less; names as `finished` has them."""
    first = finished("first", 200)
    steps = 400
    events = [*beginning(steps), *steps_between(1, steps, steps, worse=0.4), ending(steps, "second@v1")]
    return first, write_run("second", card_plan(steps), events, made=BEGAN + 10)


def damaged(name: str = "broken", made: float = BEGAN - 10) -> RunFolder:
    """A run folder whose plan is half a file."""
    run = write_run(name, card_plan(10), [], made=made)
    run.plan_file.write_text(run.plan_file.read_text()[:40])
    os.utime(run.plan_file, (made, made))
    return run
