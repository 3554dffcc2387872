"""Memory that really runs out: the process may not grow, and the C library refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from edgepeft.data.prepare import describe_data
from edgepeft.errors import ExitCode
from edgepeft.processes import worker_environment
from edgepeft.runs.events import Failed, Finished, OutOfMemoryHit, Recovered, StepDone
from edgepeft.runs.events_file import read_events
from edgepeft.runs.layout import RunFolder
from edgepeft.units import MIB
from training_runs import of_type, tiny_base, tiny_run

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of the data segment as Linux has")

# The limit comes with the trial of the largest micro-batch: what libraries take before differs between machines.
LIMITED_WORKER = """
import resource, sys
from pathlib import Path
from edgepeft.engine.workers import train
from edgepeft.runs.events_file import EventWriter

write, room = EventWriter.write, int(sys.argv[2])

def write_and_limit(self, event):
    global room
    write(self, event)
    if room and getattr(event, "detail", "").startswith("trying the largest micro-batch"):
        status = Path("/proc/self/status").read_text()
        held = int(status.partition("VmData:")[2].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (held + room, resource.RLIM_INFINITY))
        room = 0

EventWriter.write = write_and_limit
sys.exit(train.main([sys.argv[1]]))
"""


def work(run: RunFolder, room_bytes: int) -> int:
    environment = worker_environment() | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    with run.log_file.open("ab") as log:
        command = [sys.executable, "-c", LIMITED_WORKER, str(run.path), str(room_bytes)]
        return subprocess.run(command, stdout=log, stderr=log, env=environment, check=False, timeout=240).returncode


def long_samples(path: Path) -> Path:
    lines = [json.dumps({"prompt": f"Write {n}", "completion": "ab " * (60 + n % 7)}) for n in range(12)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_an_allocator_that_refuses_makes_the_layout_smaller(tmp_path: Path) -> None:
    base = tiny_base(tmp_path, hidden_size=128, intermediate_size=1024, num_hidden_layers=4, head_dim=32)
    options = {
        "data": describe_data(long_samples(tmp_path / "long.jsonl"), eval_fraction=0.0),
        "checkpointing": "none",
        "micro_batch_tokens": 2400,
        "samples_per_step": 10,
        "max_steps": 2,
    }
    free, limited = (tiny_run(tmp_path, base, name, **options) for name in ("free", "limited"))
    assert work(free, 0) == 0, free.log_file.read_text()
    peak = of_type(read_events(free.events_file), Finished)[0].measured_peak_bytes
    assert peak > 100 * MIB
    assert work(limited, peak // 2) == 0, limited.log_file.read_text()
    events = read_events(limited.events_file)
    hits = of_type(events, OutOfMemoryHit)
    assert hits[0].phase == "probe"
    assert any("DefaultCPUAllocator" in hit.message for hit in hits), hits
    assert of_type(events, Recovered)[-1].micro_batch_tokens <= 1200
    assert [done.step for done in of_type(events, StepDone)] == [1, 2]
    expected = load_file(free.adapter / "adapter_model.safetensors")
    for name, value in load_file(limited.adapter / "adapter_model.safetensors").items():
        assert abs(value - expected[name]).max() <= 1e-4, name


def test_where_nothing_fits_the_worker_ends_with_what_would_help(tmp_path: Path) -> None:
    base = tiny_base(tmp_path, hidden_size=128, intermediate_size=1024, num_hidden_layers=4, head_dim=32)
    data = describe_data(long_samples(tmp_path / "long.jsonl"), eval_fraction=0.0)
    run = tiny_run(tmp_path, base, data=data, max_steps=1, budget_bytes=base.weights_bytes * 5 // 4)
    assert work(run, 0) == ExitCode.OUT_OF_MEMORY, run.log_file.read_text()
    (failed,) = of_type(read_events(run.events_file), Failed)
    assert "--max-seq-len" in failed.message
    assert failed.traceback == ""
    assert not of_type(read_events(run.events_file), StepDone)
