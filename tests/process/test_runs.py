"""Runs with real child processes: launched, followed, stopped, killed, resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgepeft.errors import BadInput, ExitCode, OutOfMemory
from edgepeft.paths import home
from edgepeft.runs import launch as launching
from edgepeft.runs.events import Finished, Recovered, Started, StepDone
from edgepeft.runs.events_file import read_events
from edgepeft.runs.layout import RunFolder, list_runs, open_run
from edgepeft.runs.lock import is_locked
from edgepeft.runs.state import read_launched, read_state
from toy_run import start_toy_worker, toy_plan

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals")

COMMAND_LINE = """
import sys
from edgepeft.cli.app import run
from edgepeft.runs import launch
from toy_run import start_toy_worker, toy_plan
import edgepeft.cli.train

launch.start_worker = start_toy_worker
edgepeft.cli.train._make_plan = lambda *_: toy_plan(steps=int(sys.argv[1]))
run(sys.argv[2:])
"""


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(launching, "start_worker", start_toy_worker)
    yield
    for run in list_runs():
        if is_locked(run):
            kill_worker(run)


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def kill_worker(run: RunFolder) -> None:
    launched = read_launched(run.launched_file)
    assert launched is not None
    assert launched.pid is not None
    os.kill(launched.pid, signal.SIGKILL)
    wait_for(lambda: not is_locked(run))


def command(*arguments: str, steps: int = 6) -> subprocess.Popen[str]:
    # Before what is there: a worktree is tested by naming it in PYTHONPATH.
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND_LINE, str(steps), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(process: subprocess.Popen[str], seconds: float = 30.0) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def followed(run_id: str) -> subprocess.Popen[str]:
    """A follower that has told its first step."""
    process = command("runs", "attach", run_id)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("Step")
    return process


def test_a_launched_run_finishes_alone() -> None:
    run = launching.launch(toy_plan(), "whole")
    assert run.id == "whole-1"
    assert read_state(run).alive
    wait_for(lambda: not is_locked(run))
    state = read_state(run)
    assert (state.status, state.step, state.eval_loss) == ("finished", 6, 0.5)
    with pytest.raises(BadInput, match="is finished"):
        launching.resume(run)
    launching.remove(run)
    assert list(home().runs.iterdir()) == []


def test_it_is_never_lost_while_it_starts() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        launched = pool.submit(launching.launch, toy_plan(), "watched")
        wait_for(lambda: home().runs.is_dir() and (home().runs / "watched-1").is_dir())
        run, seen = open_run("watched-1"), set()
        while not seen or read_state(run).alive:
            # Between the folder and its marker lies one moment in which nothing was launched yet.
            if run.launched_file.exists():
                seen.add(read_state(run).status)
        launched.result()
    assert seen <= {"starting", "running", "finished"}
    assert "starting" in seen


def test_killed_is_lost_and_resume_finishes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.1")
    run = launching.launch(toy_plan(steps=8), "killed")
    wait_for(lambda: read_state(run).step >= 3)
    with pytest.raises(BadInput, match="is running"):
        launching.resume(run)
    with pytest.raises(BadInput, match="Stop it first"):
        launching.remove(run)
    kill_worker(run)
    lost = read_state(run)
    assert (lost.status, lost.resumable) == ("lost", True)
    assert 3 <= lost.step < 8

    monkeypatch.setenv("TOY_STEP_SECONDS", "0.01")
    launching.resume(run)
    wait_for(lambda: not read_state(run).alive)
    assert (read_state(run).status, read_state(run).step) == ("finished", 8)
    begun = [event.step for event in read_events(run.events_file) if isinstance(event, Started)]
    assert begun == [0, lost.step // 2 * 2]


def test_stop_saves_and_a_stopped_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.05")
    run = launching.launch(toy_plan(steps=200), "stopped")
    wait_for(lambda: read_state(run).step >= 2)
    state = launching.stop(run, 20.0)
    assert (state.status, state.alive) == ("stopped", False)
    assert isinstance(read_events(run.events_file)[-1], Finished)
    launching.resume(run)
    step = state.step
    wait_for(lambda: read_state(run).step > step)
    assert launching.stop(run, 20.0).status == "stopped"


def test_a_deaf_worker_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_DEAF", "1")
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.2")
    monkeypatch.setattr(launching, "_TERMINATE_SECONDS", 0.3)
    run = launching.launch(toy_plan(steps=1000), "deaf")
    wait_for(lambda: read_state(run).step >= 1)
    assert launching.stop(run, 0.3).status == "lost"
    assert not is_locked(run)


def test_stop_does_not_end_a_stranger_with_the_same_process_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.2")
    monkeypatch.setenv("TOY_DEAF", "1")
    run = launching.launch(toy_plan(steps=1000), "pid")
    launched = run.launched_file.read_bytes()
    content = json.loads(launched) | {"pid": os.getpid()}
    run.launched_file.write_text(json.dumps(content))
    with pytest.raises(BadInput, match="does not stop"):
        launching.stop(run, 0.2)
    run.launched_file.write_bytes(launched)
    kill_worker(run)


def test_a_worker_that_refuses_at_once_is_told_with_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_EARLY_EXIT", "5")
    with pytest.raises(OutOfMemory, match="the toy refuses to begin"):
        launching.launch(toy_plan(), "early")
    assert read_state(open_run("early-1")).status == "lost"


def test_two_launchers_of_one_name_get_two_runs() -> None:
    first, second = command("train", "--name", "twin", "--detach"), command("train", "--name", "twin", "--detach")
    results = [finish(first), finish(second)]
    assert [code for code, _, _ in results] == [0, 0]
    for name in ("twin-1", "twin-2"):
        run = open_run(name)
        wait_for(lambda run=run: not read_state(run).alive)
        assert read_state(run).status == "finished"


def test_train_tells_the_plan_the_steps_and_the_outcome() -> None:
    code, out, err = finish(command("train", "--name", "told"))
    assert code == 0, err
    assert "Choices  rank 4 (user) · precision nf4" in err
    assert "Memory   peak of 1.00 MiB predicted (train step), budget 1.91 MiB, on the CPU" in err
    assert "Run      told-1" in err
    assert "Step 6/6: loss 0.3333" in err
    assert "Step 6: held-out loss 0.5000 on 8 samples, best so far" in err
    assert out.startswith("Trained ")
    assert "Loss     training 0.3333, held out 0.5000" in out
    assert "predicted (-1.0 %)" in out or "predicted (-0.9 %)" in out
    assert "edgepeft chat toy --adapter" in out
    assert "Traceback" not in err


def test_train_as_json_is_the_event_stream() -> None:
    code, out, _ = finish(command("train", "--name", "lines", "--json"))
    kinds = [json.loads(line)["type"] for line in out.splitlines()]
    assert code == 0
    assert kinds[0] == "launched"
    assert kinds[1] == "started"
    assert kinds.count("step") == 6
    assert kinds[-1] == "finished"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_without_a_terminal_an_interrupt_stops_and_saves(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.1")
    process = command("train", "--name", "interrupted", steps=300)
    wait_for(lambda: (home().runs / "interrupted-1").is_dir() and read_state(open_run("interrupted-1")).step >= 2)
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == ExitCode.INTERRUPTED, err
    assert out.startswith("Stopped and saved")
    assert "edgepeft runs resume interrupted-1" in out
    assert read_state(open_run("interrupted-1")).status == "stopped"


def test_a_failing_run_gives_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_FAIL", "3")
    code, _, err = finish(command("train", "--name", "fails"))
    assert code == ExitCode.OUT_OF_MEMORY
    assert "run fails-1 failed: the toy broke at step 3" in err
    monkeypatch.delenv("TOY_FAIL")
    code, out, err = finish(command("runs", "resume", "fails-1"))
    assert code == 0, err
    assert "Resumed after step 2 of 6" in err
    assert out.startswith("Trained")


def test_a_followed_worker_that_is_killed_goes_on_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_KILLED", "4")
    code, out, err = finish(command("train", "--name", "oom"))
    assert code == 0, err
    assert "The worker was killed, probably for lack of memory." in err
    assert "from its checkpoint of step 2 with a smaller layout; Ctrl-C stops it." in err
    assert "step 3 begins with a smaller layout, nothing lost: half" in err
    assert out.startswith("Trained")
    events = read_events(open_run("oom-1").events_file)
    assert [event.step for event in events if isinstance(event, Started)] == [0, 2]
    assert [event.cause for event in events if isinstance(event, Recovered)] == ["killed"]


def test_killed_twice_it_is_lost_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_KILLED", "4,5")
    code, _, err = finish(command("train", "--name", "twice"))
    assert code == ExitCode.INTERRUPTED
    assert "run twice-1 is lost at step 4 of 6: its worker was killed once more, in a smaller layout" in err
    assert "--budget" in err
    assert "edgepeft runs resume twice-1" in err
    run = open_run("twice-1")
    assert sum(isinstance(event, Started) for event in read_events(run.events_file)) == 2
    # Resumed by a person, it may be saved by itself once more.
    monkeypatch.setenv("TOY_KILLED", "6")
    # Whoever resumes it looks before it dies, on a busy machine too.
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.3")
    code, _, err = finish(command("runs", "resume", "twice-1"))
    assert code == ExitCode.DONE, err
    assert "goes on by itself" in err
    assert sum(isinstance(event, Started) for event in read_events(run.events_file)) == 4


def test_a_card_that_fails_is_tried_again_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_CARD_FAILS", "3")
    code, _, err = finish(command("train", "--name", "card"))
    assert code == 0, err
    assert "The card failed (CUDA error: the card fell off)." in err
    monkeypatch.setenv("TOY_CARD_FAILS", "3,4")
    code, _, err = finish(command("train", "--name", "cards"))
    assert code == ExitCode.DEVICE
    assert "run cards-1 failed: CUDA error: the card fell off" in err


def test_whoever_follows_a_run_started_elsewhere_saves_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.1")
    run = launching.launch(toy_plan(steps=500), "dies")
    processes = [followed("dies-1") for _ in range(2)]
    kill_worker(run)
    wait_for(lambda: sum(isinstance(event, Started) for event in read_events(run.events_file)) == 2)
    kill_worker(run)
    ended = [finish(process) for process in processes]
    # One of the two started it again, and both went on following.
    assert [code for code, _, _ in ended] == [ExitCode.INTERRUPTED] * 2
    assert sum("goes on by itself" in err for _, _, err in ended) == 1
    assert all("killed once more" in err for _, _, err in ended)
    begun = [event for event in read_events(run.events_file) if isinstance(event, Started)]
    assert len(begun) == 2


def test_a_run_that_is_lost_already_is_only_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.1")
    run = launching.launch(toy_plan(steps=500), "gone")
    wait_for(lambda: read_state(run).step >= 2)
    kill_worker(run)
    code, _, err = finish(command("runs", "attach", "gone-1"))
    assert code == ExitCode.INTERRUPTED
    assert "run gone-1 is lost" in err
    assert sum(isinstance(event, Started) for event in read_events(run.events_file)) == 1


def test_a_worker_that_did_not_stop_in_time_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_DEAF", "1")
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.2")
    monkeypatch.setattr(launching, "_TERMINATE_SECONDS", 0.3)
    run = launching.launch(toy_plan(steps=1000), "deaf")
    follower = followed("deaf-1")
    assert launching.stop(run, 0.3).status == "lost"
    code, _, err = finish(follower)
    assert code == ExitCode.INTERRUPTED
    assert "goes on by itself" not in err
    assert not is_locked(run)


def test_the_commands_agree_on_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.05")
    run = launching.launch(toy_plan(steps=400), "seen")
    wait_for(lambda: read_state(run).step >= 1)
    listed = json.loads(finish(command("runs", "list", "--json"))[1])
    assert [(found["id"], found["state"]["status"]) for found in listed] == [("seen-1", "running")]
    shown = json.loads(finish(command("runs", "show", "seen-1", "--json"))[1])
    assert shown["plan"]["adapter_name"] == "seen"
    code, _, err = finish(command("runs", "remove", "seen-1"))
    assert (code, "Add --yes" in err) == (ExitCode.USAGE, True)
    assert finish(command("runs", "remove", "seen-1", "--yes"))[0] == ExitCode.BAD_INPUT
    stopped = json.loads(finish(command("runs", "stop", "seen-1", "--json"))[1])
    assert stopped["state"]["status"] == "stopped"
    code, out, _ = finish(command("runs", "show", "seen-1"))
    assert code == 0
    assert "Status   stopped" in out
    assert "runs resume seen-1" in out
    assert finish(command("runs", "remove", "seen-1", "--yes"))[0] == 0
    code, _, err = finish(command("runs", "show", "seen-1"))
    assert (code, "no run 'seen-1'" in err) == (ExitCode.BAD_INPUT, True)
    assert sum(isinstance(event, StepDone) for event in read_events(run.events_file)) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--json"], "--name: the adapter has no name"),
        (["train", "--name", "No Good"], "cannot be used as a name"),
    ],
)
def test_bad_usage_is_one_line(arguments: list[str], said: str) -> None:
    code, out, err = finish(command(*arguments))
    assert (code, out) == (ExitCode.USAGE, "")
    assert said in err
    assert err.count("\n") == 1
