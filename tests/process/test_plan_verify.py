"""Plans checked by dry runs in a real child process: agreement, the cache, an unknown architecture, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from edgepeft.errors import BadInput, DeviceUnusable, EdgepeftError, ExitCode, Interrupted
from edgepeft.memory.dry_run import DryRunRequest
from edgepeft.memory.target import CPU
from edgepeft.memory.workload import Workload
from edgepeft.plan import verify
from edgepeft.plan.build import build
from edgepeft.plan.files import read_plan_toml, write_plan_toml
from edgepeft.plan.revise import revise
from edgepeft.plan.verify import CannotSimulateError, Simulator, answer_file
from edgepeft.units import MIB
from shapes import run_spec
from tiny import tiny_config, write_alpaca, write_tiny_model

REQUEST = DryRunRequest(
    run_spec(precision="fp32", compute_dtype="fp32", rank=4), tiny_config(), Workload(40, 20, 30), CPU
)


def changed(**config: Any) -> DryRunRequest:
    return DryRunRequest(REQUEST.spec, tiny_config(**config), REQUEST.workload, CPU)


def test_one_worker_answers_many_and_known_answers_need_none(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with Simulator(said.append) as simulator:
        first = simulator.dry_run(REQUEST)
        worker = simulator._worker
        larger = simulator.dry_run(changed(intermediate_size=256))
        assert simulator._worker is worker
        with pytest.raises(EdgepeftError):
            simulator.dry_run(changed(hidden_size=63))
        assert simulator.dry_run(changed(num_hidden_layers=1)).layers == 1
    assert worker is not None
    assert worker.poll() is not None
    assert larger.memory.peak_bytes > first.memory.peak_bytes
    assert len(said) == 4

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a worker was started for a known answer")

    monkeypatch.setattr(verify, "start_worker", refuse)
    assert verify.dry_run(REQUEST) == first
    answer_file(REQUEST).write_text("{")
    with pytest.raises(AssertionError, match="known answer"):
        verify.dry_run(REQUEST)


def test_a_worker_that_ends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object, **streams: Any) -> subprocess.Popen[bytes]:
        code = "import sys; sys.stderr.write('no such kernel'); sys.exit(3)"
        return subprocess.Popen([sys.executable, "-c", code], **streams)

    monkeypatch.setattr(verify, "start_worker", start)
    with pytest.raises(DeviceUnusable, match="no such kernel"):
        verify.dry_run(REQUEST)


@pytest.mark.parametrize("kind", ["llama", "olmo"])
@pytest.mark.slow
def test_verify_compares_and_an_unknown_architecture_is_always_simulated(tmp_path: Path, kind: str) -> None:
    known = {"llama": {}, "olmo": {"model_type": "olmo", "architectures": ["OlmoForCausalLM"]}}[kind]
    model, data = write_tiny_model(tmp_path / "tiny", **known), write_alpaca(tmp_path / "a.jsonl")
    command = [sys.executable, "-m", "edgepeft", "plan", str(model), str(data), "--gpu", "cpu", "--budget", "6MiB"]
    if kind == "llama":
        command.append("--verify")
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    told = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    phases = {phase["name"]: sum(phase["bytes_by_category"].values()) for phase in told["dry_run"]["memory"]["phases"]}
    assert max(phases.values()) <= 6 * MIB
    predicted = {phase["name"]: sum(phase["bytes_by_category"].values()) for phase in told["memory"]["phases"]}
    assert predicted["train step"] == pytest.approx(phases["train step"], rel=0.05)
    assert "Dry run" in shown
    assert ("difference" in shown) == (kind == "llama")
    assert ("has no closed form" in shown) == (kind == "olmo")


@pytest.mark.slow
def test_a_simulated_plan_is_the_same_when_its_file_is_read_again(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny", model_type="olmo", architectures=["OlmoForCausalLM"])
    made = build(str(model), write_alpaca(tmp_path / "a.jsonl"), {"gpu": "cpu", "budget": "6MiB"})
    assert made.dry_run is not None
    write_plan_toml(made, tmp_path / "p.toml")
    assert revise(read_plan_toml(tmp_path / "p.toml"), where="p.toml") == made


@pytest.mark.parametrize(("code", "kind"), [(ExitCode.BUG, CannotSimulateError), (ExitCode.BAD_INPUT, BadInput)])
def test_a_step_that_cannot_be_followed_is_told_apart_from_one_that_cannot_be_trained(
    monkeypatch: pytest.MonkeyPatch, code: ExitCode, kind: type[EdgepeftError]
) -> None:
    answer = json.dumps({"code": int(code), "what": "it needs values", "where": "gpt", "hint": ""})

    def start(*_: object, **streams: Any) -> subprocess.Popen[bytes]:
        answers = f"import sys; [print({answer!r}, flush=True) for line in sys.stdin]"
        return subprocess.Popen([sys.executable, "-c", answers], **streams)

    monkeypatch.setattr(verify, "start_worker", start)
    with Simulator() as simulator:
        for _ in range(2):
            with pytest.raises(EdgepeftError, match="gpt: it needs values") as failed:
                simulator.dry_run(REQUEST)
            assert type(failed.value) is kind


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_an_interrupt_ends_the_dry_run_too(tmp_path: Path) -> None:
    model, data = write_tiny_model(tmp_path / "tiny"), write_alpaca(tmp_path / "a.jsonl")
    command = [sys.executable, "-m", "edgepeft", "plan", str(model), str(data), "--gpu", "cpu", "--verify"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 120
    while not children and process.poll() is None and time.monotonic() < deadline:
        children = psutil.Process(process.pid).children()
        time.sleep(0.01)
    assert children
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == ExitCode.INTERRUPTED
    assert b"Traceback" not in complaint
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


def test_a_cancel_from_another_thread_ends_the_dry_run_at_once() -> None:
    simulator = Simulator()
    # The worker imports torch for longer than this.
    timer = threading.Timer(0.3, simulator.cancel)
    begin = time.monotonic()
    with simulator:
        timer.start()
        with pytest.raises(Interrupted, match="cancelled"):
            simulator.dry_run(REQUEST)
        assert time.monotonic() - begin < 10
        with pytest.raises(Interrupted):
            simulator.dry_run(REQUEST)
    assert not answer_file(REQUEST).exists()
