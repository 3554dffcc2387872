"""The process that answers dry runs."""

from __future__ import annotations

import subprocess
from typing import Any

import msgspec

from edgepeft.memory.dry_run import DryRun, DryRunFailed, DryRunRequest
from edgepeft.memory.target import CPU, Target
from edgepeft.memory.workload import full_workload
from edgepeft.processes import start_worker
from shapes import run_spec
from tiny import tiny_config


def ask(*lines: bytes) -> list[bytes]:
    worker = start_worker("simulate", [], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    answers, _ = worker.communicate(b"\n".join(lines) + b"\n", timeout=250)
    assert worker.returncode == 0
    return answers.splitlines()


def request(config: dict[str, Any], target: Target = CPU, **changes: Any) -> bytes:
    return msgspec.json.encode(DryRunRequest(run_spec(**changes), config, full_workload(64, 32), target))


def test_one_process_answers_many_requests_in_order() -> None:
    answers = ask(
        request(tiny_config()),
        b"not json",
        request(tiny_config(model_type="no_such_model", auto_map={"AutoModelForCausalLM": "evil.Model"})),
        request(tiny_config(), rank=65),
        request(tiny_config(), Target("cuda", (8, 9))),
    )
    assert len(answers) == 5
    first, last = (msgspec.json.decode(answers[at], type=DryRun) for at in (0, 4))
    assert [phase.name for phase in first.memory.phases] == ["load", "train step", "evaluation", "save"]
    assert first.device == "cpu"
    assert last.device == "cuda 8.9, on fake CPU tensors"
    assert last.memory.peak_bytes > first.memory.peak_bytes
    refused = [msgspec.json.decode(answers[at], type=DryRunFailed) for at in (1, 2, 3)]
    assert [failed.code for failed in refused] == [2, 3, 2]
    assert "cannot be read" in refused[0].what
    assert "no_such_model" in refused[1].what
    assert "rank 65" in refused[2].what
