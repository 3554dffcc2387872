"""A plan that names nothing real, and a worker that does no training: what runs are made of, without torch.

As a program it is a stand-in for the training worker: `python toy_run.py RUN_FOLDER` holds the run's lock, writes
events, keeps a checkpoint every second step and obeys `control.json`. `TOY_STEP_SECONDS`, `TOY_FAIL`, `TOY_DEAF`,
`TOY_KILLED`, `TOY_CARD_FAILS` and `TOY_EARLY_EXIT` in the environment say how it behaves; of the two before the last,
`3` is the step at which it happens to the first worker, and `3,5` lets it happen to the second one as well.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from edgepeft.data.prepare import fingerprint_file
from edgepeft.memory.breakdown import Breakdown, Phase
from edgepeft.methods.lora import LoraConfig
from edgepeft.paths import write_atomic
from edgepeft.plan.train_plan import Choice, DataSummary, TrainPlan
from edgepeft.runs.control import read_request
from edgepeft.runs.events import (
    CheckpointSaved,
    Evaluated,
    Failed,
    Finished,
    PhaseChanged,
    Recovered,
    Started,
    StepDone,
)
from edgepeft.runs.events_file import EventWriter
from edgepeft.runs.layout import RunFolder
from edgepeft.runs.lock import RunLock
from edgepeft.spec import BaseRef, DataRef, Layout, Recipe, RunSpec


def toy_plan(steps: int = 6, fingerprint: str = "sha256:base") -> TrainPlan:
    """A plan of `steps` steps; its base does not exist, and its data is this file."""
    recipe = Recipe(
        base=BaseRef("toy", fingerprint, "LlamaForCausalLM"),
        data=DataRef(__file__, fingerprint_file(Path(__file__)), "text"),
        method=LoraConfig(rank=4),
        precision="nf4",
        compute_dtype="bf16",
        max_seq_len=128,
        samples_per_step=4,
    )
    peak = Phase("train step", {"frozen weights": 900_000, "adapter weights": 50_000, "optimizer state": 100_000})
    return TrainPlan(
        spec=RunSpec(recipe=recipe, layout=Layout(micro_batch_tokens=256), budget_bytes=2_000_000),
        choices=(Choice("rank", "4", "user", "typed"), Choice("precision", "nf4", "auto", "it fits")),
        memory=Breakdown((peak,)),
        steps=steps,
        data=DataSummary(
            samples=4 * steps,
            train_samples=4 * steps,
            eval_samples=0,
            tokens=100 * steps,
            trained_tokens=60 * steps,
            length_p50=25,
            length_p99=30,
            length_max=32,
            overlong=0,
        ),
    )


def toy_step(step: int, loss: float = 1.0, seconds: float = 0.1) -> StepDone:
    return StepDone(
        step=step,
        loss=loss,
        learning_rate=1e-3,
        grad_norm=0.5,
        tokens=100,
        trained_tokens=60,
        seconds=seconds,
        tokens_per_second=100 / seconds,
        live_bytes=1_000_000,
        peak_bytes=1_040_000 + step,
        eta_seconds=12.0,
    )


def start_toy_worker(
    name: str, arguments: list[str], *, device: str = "cpu", **options: Any
) -> subprocess.Popen[bytes]:
    """In place of `processes.start_worker`: the same process options, the program below."""
    assert name == "train"
    assert device == "cpu"
    options.pop("detached")
    assert not options.pop("deterministic")
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).absolute()), *arguments],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        **options,
    )


def _step_of(name: str) -> int:
    """The step at which something happens to this worker; -1 when nothing does."""
    steps = os.environ.get(name, "-1").split(",")
    second = "--smaller" in sys.argv
    return int(steps[second]) if second < len(steps) else -1


def _work(run: RunFolder) -> int:
    plan = run.read_plan()
    pause = float(os.environ.get("TOY_STEP_SECONDS", "0.02"))
    checkpoint = run.checkpoints / "step"
    first = int(checkpoint.read_text()) if checkpoint.exists() else 0
    with EventWriter(run.events_file) as events:
        events.write(Started(step=first, steps=plan.steps, device="toy", versions={"toy": "1"}))
        events.write(PhaseChanged(name="train"))
        if "--smaller" in sys.argv:
            cause = "killed" if sys.argv[-1] == "killed" else "device"
            events.write(
                Recovered(step=first + 1, what="half", micro_batch_tokens=128, checkpointing="layer", cause=cause)
            )
        stopped = False
        for step in range(first + 1, plan.steps + 1):
            time.sleep(pause)
            if os.environ.get("TOY_FAIL") == str(step):
                events.write(Failed(message=f"the toy broke at step {step}", exit_code=5, step=step))
                return 5
            if step == _step_of("TOY_CARD_FAILS"):
                events.write(Failed(message="CUDA error: the card fell off", exit_code=6, step=step))
                return 6
            if step == _step_of("TOY_KILLED"):
                os.kill(os.getpid(), signal.SIGKILL)
            events.write(toy_step(step, 2.0 / step))
            if step % 2 == 0:
                write_atomic(checkpoint, str(step))
                events.write(CheckpointSaved(step=step, path="checkpoints/step"))
            if read_request(run) == "stop" and not os.environ.get("TOY_DEAF"):
                stopped = step < plan.steps
                break
        events.write(Evaluated(step=step, loss=0.5, samples=8, trained_tokens=80, best=True))
        events.write(
            Finished(
                step=step,
                adapter="adapter",
                stopped=stopped,
                train_seconds=step * pause,
                tokens_per_second=1000.0,
                predicted_peak_bytes=plan.memory.peak_bytes,
                measured_peak_bytes=1_040_000 + step,
                train_loss=2.0 / step,
                eval_loss=0.5,
            )
        )
    return 0


def main() -> int:
    if code := os.environ.get("TOY_EARLY_EXIT"):
        sys.stderr.write("the toy refuses to begin\n")
        return int(code)
    if os.environ.get("TOY_DEAF"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    run = RunFolder(Path(sys.argv[1]))
    with RunLock(run):
        return _work(run)


if __name__ == "__main__":
    sys.exit(main())
