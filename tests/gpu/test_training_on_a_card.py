"""On a CUDA card: the frozen weights, the packed attention and a whole run against its prediction."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import torch

from edgepeft.engine.methods.prefix import PrefixUpdate
from edgepeft.engine.model.frozen import freeze
from edgepeft.engine.model.prefix import PrefixSite
from edgepeft.engine.training.attention import packed, packed_attention
from edgepeft.paths import home
from edgepeft.processes import start_worker
from edgepeft.runs.events import StepDone
from edgepeft.runs.events_file import read_events
from edgepeft.runs.layout import create_run, list_runs
from edgepeft.spec import Precision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
def test_a_frozen_weight_multiplies_on_the_card_as_its_dense_values_do(precision: Precision) -> None:
    device = torch.device("cuda")
    torch.manual_seed(0)
    dense = torch.randn(256, 128, dtype=torch.bfloat16)
    weight = freeze(dense, precision, "bf16", device)
    values = weight.materialize(torch.empty(256, 128, dtype=torch.bfloat16, device=device)).clone()
    x = torch.randn(7, 128, dtype=torch.bfloat16, device=device)
    torch.testing.assert_close(weight.matmul(x), x @ values.t(), rtol=2e-2, atol=2e-1)


def test_packed_attention_on_the_card_equals_the_cpu() -> None:
    lengths = [5, 17, 42]
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, sum(lengths), 32) for heads in (4, 2, 2))
    module = torch.nn.Identity()
    with packed(lengths):
        expected, _ = packed_attention(module, query, key, value)
    with packed(lengths):
        found, _ = packed_attention(module, *(part.cuda().bfloat16() for part in (query, key, value)))
    torch.testing.assert_close(found.float().cpu(), expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("window", [None, 9])
def test_keys_before_every_sample_on_the_card_equal_the_cpu(window: int | None) -> None:
    """The flash kernel takes queries for the last of more keys; gradients too."""
    lengths = [5, 17, 42]
    torch.manual_seed(0)
    given = [torch.randn(1, heads, sum(lengths), 32) for heads in (4, 2, 2)]
    before = [torch.randn(6, 2, 32) for _ in range(2)]

    def run(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [x.to(device, dtype).requires_grad_() for x in given]
        layer = torch.nn.Identity()
        site = PrefixSite(layer, "layer")
        # The prefix itself is float32.
        site.adapters["a"] = PrefixUpdate(*(x.to(device) for x in before))
        site.activate([("a", 1.0)])
        trained = site.adapters["a"].keys_and_values()
        with packed(lengths):
            out, _ = packed_attention(layer, *inputs, sliding_window=window)
            out.float().square().sum().backward()
        gradients = [x.grad for x in (*inputs, *trained) if x.grad is not None]
        return [x.float().cpu() for x in (out.detach(), *gradients)]

    for found, expected in zip(run("cuda", torch.bfloat16), run("cpu", torch.float32), strict=True):
        assert (found - expected).norm() < 2e-2 * expected.norm()


def test_a_deterministic_run_gives_the_same_bits_and_resumes_to_them(alpaca_file: Path) -> None:
    def train(name: str) -> Path:
        arguments = ["train", "smollm2-135m", str(alpaca_file), "--name", name, "--gpu", "0", "--max-steps", "6"]
        command = [sys.executable, "-m", "edgepeft", *arguments, "--deterministic", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return home().adapters / name / "v1" / "adapter_model.safetensors"

    digests = [hashlib.sha256(train(name).read_bytes()).hexdigest() for name in ("one", "two")]
    print(f"two runs: {digests[0][:16]} and {digests[1][:16]}")
    assert digests[0] == digests[1]
    # Resumed from its checkpoint of an earlier step, it comes to the same values once more.
    (run,) = (run for run in list_runs() if run.id == "two-1")
    plan = run.read_plan()
    upkeep = msgspec.structs.replace(plan.spec.upkeep, checkpoint_steps=2)
    resumed = create_run(msgspec.structs.replace(plan, spec=msgspec.structs.replace(plan.spec, upkeep=upkeep)), "three")
    worker = start_worker("train", [str(resumed.path)], device=plan.spec.device, deterministic=True)
    while not any(isinstance(event, StepDone) and event.step >= 3 for event in read_events(resumed.events_file)):
        assert worker.poll() is None
        time.sleep(0.005)
    worker.kill()
    worker.wait()
    worker = start_worker("train", [str(resumed.path)], device=plan.spec.device, deterministic=True)
    assert worker.wait(300) == 0
    weights = resumed.adapter / "adapter_model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == digests[0]


def test_the_energy_of_a_run_is_counted(alpaca_file: Path) -> None:
    arguments = ["train", "smollm2-135m", str(alpaca_file), "--name", "watts", "--gpu", "0", "--max-steps", "20"]
    done = subprocess.run(
        [sys.executable, "-m", "edgepeft", *arguments, "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    finished = json.loads(done.stdout.splitlines()[-1])
    watts = 3600 * finished["energy_wh"] / finished["train_seconds"]
    print(f"{finished['energy_wh']:.3f} Wh of {finished['energy_of']}, about {watts:.0f} W")
    assert "card" in finished["energy_of"]
    assert 1 < watts < 3000


def test_a_run_keeps_its_predicted_peak(alpaca_file: Path) -> None:
    arguments = ["train", "smollm2-135m", str(alpaca_file), "--name", "gpu", "--gpu", "0", "--max-steps", "4", "--json"]
    done = subprocess.run([sys.executable, "-m", "edgepeft", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    finished = json.loads(done.stdout.splitlines()[-1])
    predicted, measured = finished["predicted_peak_bytes"], finished["measured_peak_bytes"]
    print(
        f"predicted {predicted / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB ({measured / predicted - 1:+.1%})"
    )
    assert measured <= 1.05 * predicted
