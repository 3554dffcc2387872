"""`edgepeft adapters compose` and `average` with a real worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from adapter_files import dense_updates, make_card, write_lora, write_peft_folder
from edgepeft.cli.app import app
from edgepeft.errors import BadInput, ExitCode
from edgepeft.library.audit import read_audit
from edgepeft.library.store import publish, resolve_adapter
from edgepeft.models.store import add_model


def told(*arguments: str) -> Any:
    """What `edgepeft adapters ARGUMENTS --json` prints; its error is raised."""
    result = CliRunner().invoke(app, ["adapters", *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads(result.stdout)


def left_behind(home: Path) -> list[Path]:
    """What is neither a finished version nor the audit."""
    made = (home / "adapters").glob("*/*")
    return [path for path in made if path.name.startswith(".")] + list((home / "cache" / "combining").glob("*"))


@pytest.fixture
def library(tiny_model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Folders of a@v1 (rank 4, 100 samples) and b@v1 (rank 3, 300 samples) over a model in the store."""
    entry = add_model(tiny_model, "tiny")
    folders = []
    for name, rank, samples in (("a", 4, 100.0), ("b", 3, 300.0)):
        folders.append(write_peft_folder(tmp_path / name, entry.shape, rank=rank, seed=rank))
        card = make_card(base_fingerprint=entry.fingerprint, metrics={"train_samples": samples})
        publish(folders[-1], name, card)
    return folders[0], folders[1]


def test_compose_and_average_publish_what_was_asked_for(library: tuple[Path, Path], edgepeft_home: Path) -> None:
    a, b = (dense_updates(folder) for folder in library)
    mixed = told("compose", "--name", "mix", "a=0.7", "b=-0.3")
    assert (mixed["reference"], mixed["how"], set(mixed["ranks"].values())) == ("mix@v1", "exact", {7})
    assert mixed["distance"] < 1e-6
    found = dense_updates(Path(mixed["path"]))
    for path in a:
        np.testing.assert_allclose(found[path], 0.7 * a[path] - 0.3 * b[path], rtol=0, atol=1e-5)
    card = resolve_adapter("mix").card
    assert card is not None
    assert (card.base, card.versions["torch"] > "2", card.trainable_parameters) == (
        "tiny",
        True,
        sum(value.size for value in load_file(Path(mixed["path"]) / "adapter_model.safetensors").values()),
    )
    mean = told("average", "a", "b", "--name", "mix", "--rank", "4")
    assert (mean["reference"], mean["rank"]) == ("mix@v2", 4)
    assert [(part["weight"], part["samples"]) for part in mean["parts"]] == [(0.25, 100), (0.75, 300)]
    kept = [
        (values[:4] ** 2).sum() / (values**2).sum()
        for values in (np.linalg.svd(0.25 * a[path] + 0.75 * b[path], compute_uv=False) for path in a)
    ]
    assert mean["least_energy_kept"] == pytest.approx(min(kept), rel=1e-6)
    assert min(kept) < mean["energy_kept"] < max(kept)
    assert [line.action for line in read_audit("mix")] == ["composed", "averaged"]
    assert left_behind(edgepeft_home) == []


def test_factors_are_said_not_to_be_updates(library: tuple[Path, Path]) -> None:
    result = CliRunner().invoke(
        app, ["adapters", "compose", "b", str(library[1]), "--how", "linear", "--name", "same"], catch_exceptions=False
    )
    assert "Adding factors is not adding updates" in result.stdout
    # Twice the same factors: (B+B)(A+A) is 4 B·A, twice the sum.
    assert "100 % away from the weighted sum" in result.stdout
    assert "unverified" in result.stderr


def test_a_damaged_tensor_is_one_line_and_nothing_is_made(library: tuple[Path, Path], edgepeft_home: Path) -> None:
    weights = library[1] / "adapter_model.safetensors"
    tensors = {name: value.copy() for name, value in load_file(weights).items()}
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"][0, 3] = np.nan
    save_file(tensors, weights)
    with pytest.raises(BadInput, match=r"layers\.1\.mlp\.up_proj\.lora_A\.weight of .* not finite") as caught:
        told("compose", "a", str(library[1]), "--name", "mix")
    assert str(weights) in str(caught.value)
    assert not (edgepeft_home / "adapters" / "mix").exists()
    assert left_behind(edgepeft_home) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_an_interrupted_combination_leaves_nothing(tmp_path: Path, edgepeft_home: Path) -> None:
    sizes = {f"model.layers.{layer}.mlp.up_proj": (4, 1024, 2048) for layer in range(60)}
    folders = [str(write_lora(tmp_path / str(seed), sizes, seed=seed)) for seed in range(2)]
    command = [sys.executable, "-m", "edgepeft", "adapters", "compose", *folders, "--how", "ties", "--name", "mix"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not left_behind(edgepeft_home) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left_behind(edgepeft_home)
    time.sleep(1.5)
    (worker,) = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == ExitCode.INTERRUPTED
    assert not worker.is_running()
    assert left_behind(edgepeft_home) == []
    assert not (edgepeft_home / "adapters" / "mix").exists()
