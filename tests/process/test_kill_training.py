"""A run that is killed at any moment, again and again, gives the adapter of the run that was left alone, to the bit.

Each life of the run is the real worker's `main`, with its lock, its events and its folder, in a process of its own. To
spare twenty starts of torch, these are forked from one process that has imported it and computed nothing yet.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgepeft.library.store import list_adapters
from edgepeft.methods import LoraConfig
from edgepeft.models.store import ModelEntry
from edgepeft.runs.events import Evaluated, Finished, SampleGenerated, Started, StepDone
from edgepeft.runs.events_file import Follower, read_events
from edgepeft.runs.layout import RunFolder
from edgepeft.runs.lock import is_locked
from edgepeft.runs.state import RunWatch, read_state
from edgepeft.spec import Optimizer, Schedule
from training_runs import of_type, tiny_base, tiny_run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")]

KILLS = 24
WHILE_WRITING = 8
"""Of them, so many fall while a checkpoint is being written."""
OPTIONS = {
    "max_steps": 80,
    "epochs": 50.0,
    "checkpoint_steps": 1,
    "eval_every_steps": 4,
    "early_stop": 3,
    "keep": "best",
    "sample_prompts": ("Count to 3",),
    "method": LoraConfig(rank=4, alpha=8.0, dropout=0.1),
    "optimizer": Optimizer(learning_rate=2e-2),
    "schedule": Schedule(name="constant", warmup_fraction=0.1),
}
NURSERY = """
import os, sys, traceback
import edgepeft.engine.training.loop
from edgepeft.engine.workers.train import main
print("ready", flush=True)
for folder in sys.stdin:
    child = os.fork()
    if child:
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    log = os.open(os.path.join(folder.strip(), "worker.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0); os.dup2(log, 1); os.dup2(log, 2)
    code = 1
    try:
        code = main([folder.strip()])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
"""


class Life:
    """One process of a run."""

    def __init__(self, run: RunFolder, nursery: subprocess.Popen[str]) -> None:
        self.run = run
        self._nursery = nursery
        self._remains = drafts(run)
        """Of the life before; they stay until this one writes."""
        assert nursery.stdin is not None
        nursery.stdin.write(f"{run.path}\n")
        nursery.stdin.flush()
        self.pid = int(self._said())
        self.events = Follower(run.events_file)
        self.events.read()

    def kill(self) -> bool:
        """SIGKILL; whether that is what ended it."""
        # It is a zombie until its parent asks, so the number is still its own.
        os.kill(self.pid, signal.SIGKILL)
        return self.end() == -signal.SIGKILL

    def end(self) -> int:
        """Waits for its exit code."""
        return int(self._said())

    def wait_for_steps(self, count: int, deadline: float) -> bool:
        """Whether it has made so many steps; False once it has ended by itself."""
        seen = 0
        while seen < count and time.monotonic() < deadline:
            new = self.events.read()
            seen += sum(isinstance(event, StepDone) for event in new)
            if any(isinstance(event, Finished) for event in new):
                return False
            time.sleep(0.001)
        return seen >= count

    def wait_for_draft(self, deadline: float) -> bool:
        """Whether a checkpoint is being written at this moment."""
        while time.monotonic() < deadline:
            if self.drafts():
                return True
        return False

    def drafts(self) -> set[tuple[str, int]]:
        """What this life is writing, or was when it died."""
        return drafts(self.run) - self._remains

    def _said(self) -> str:
        assert self._nursery.stdout is not None
        return self._nursery.stdout.readline()


@pytest.fixture
def base(tmp_path: Path) -> ModelEntry:
    return tiny_base(tmp_path)


@pytest.fixture
def nursery(edgepeft_home: Path) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "EDGEPEFT_HOME": str(edgepeft_home)}
    process = subprocess.Popen(
        [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    assert process.stdin is not None
    process.stdin.close()
    process.wait(30)


def drafts(run: RunFolder) -> set[tuple[str, int]]:
    """Checkpoints that are being written, by name and time."""
    try:
        with os.scandir(run.checkpoints) as entries:
            return {(entry.name, entry.stat().st_ctime_ns) for entry in entries if entry.name.endswith(".draft")}
    except FileNotFoundError:
        return set()


@pytest.mark.timeout(280)
def test_killed_at_any_moment_it_gives_the_same_adapter(
    tmp_path: Path, base: ModelEntry, nursery: subprocess.Popen[str]
) -> None:
    whole, killed = tiny_run(tmp_path, base, "whole", **OPTIONS), tiny_run(tmp_path, base, "killed", **OPTIONS)
    assert Life(whole, nursery).end() == 0, whole.log_file.read_text()
    draw = random.Random(20)
    kills = while_writing = 0
    while kills < KILLS or while_writing < WHILE_WRITING:
        life = Life(killed, nursery)
        deadline = time.monotonic() + 60
        while not is_locked(killed) and time.monotonic() < deadline:
            time.sleep(0.001)
        moment = draw.choice(("loading", "between", "writing", "writing"))
        if moment == "loading":
            time.sleep(draw.uniform(0.0, 0.6))
        elif life.wait_for_steps(draw.randint(1, 3), deadline) and moment == "between":
            time.sleep(draw.uniform(0.0, 0.02))
        elif moment == "writing":
            life.wait_for_draft(deadline)
        assert life.kill(), (kills, killed.log_file.read_text())
        assert read_state(killed).status in ("lost", "starting")
        kills += 1
        while_writing += bool(life.drafts())
        print(f"{moment}: killed at step {read_state(killed).step}, writing {sorted(life.drafts())}")
    assert Life(killed, nursery).end() == 0, killed.log_file.read_text()

    expected, found = (run.adapter / "adapter_model.safetensors" for run in (whole, killed))
    assert found.read_bytes() == expected.read_bytes()
    ending, killed_ending = (of_type(read_events(run.events_file), Finished)[-1] for run in (whole, killed))
    assert (killed_ending.step, killed_ending.kept_step, killed_ending.ended_by, killed_ending.eval_loss) == (
        ending.step,
        ending.kept_step,
        ending.ended_by,
        ending.eval_loss,
    )
    # The plan is one that goes past its best state, so that this is put to the test too.
    assert ending.ended_by == "early stop"
    assert ending.kept_step is not None
    assert ending.kept_step < ending.step
    # Nothing counts twice: neither a step, nor an evaluation, nor the published version.
    watch, killed_watch = RunWatch(whole), RunWatch(killed)
    watch.poll()
    killed_watch.poll()
    for fold in (watch.folded, killed_watch.folded):
        assert [done.step for done in fold.history] == list(range(1, ending.step + 1))
    assert [done.loss for done in killed_watch.folded.history] == [done.loss for done in watch.folded.history]
    assert [(one.step, one.loss, one.best) for one in killed_watch.folded.evaluations] == [
        (one.step, one.loss, one.best) for one in watch.folded.evaluations
    ]
    assert sorted(adapter.reference for adapter in list_adapters()) == ["killed@v1", "whole@v1"]
    events = read_events(killed.events_file)
    assert len(of_type(events, Started)) > KILLS // 2
    assert of_type(events, Evaluated)[0].step == 0
    assert of_type(events, SampleGenerated)
    assert not drafts(killed)
