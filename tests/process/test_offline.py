"""With the network cut off, everything works unchanged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def _cut_off(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-m", "edgepeft", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


@pytest.fixture(autouse=True)
def _needs_namespaces() -> None:
    if shutil.which("unshare") is None:
        pytest.skip("unshare is a Linux program")
    probe = subprocess.run(["unshare", "--user", "--map-root-user", "--net", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("this system does not let a user make a network namespace")


def test_plan_train_chat_and_eval_need_no_network(tiny_model: Path, alpaca_file: Path) -> None:
    planned = _cut_off("plan", str(tiny_model), str(alpaca_file), "--json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["steps"] > 0
    trained = _cut_off("train", str(tiny_model), str(alpaca_file), "--name", "offline", "--max-steps", "3")
    assert trained.returncode == 0, trained.stderr
    said = _cut_off("chat", "--adapter", "offline", "--prompt", "Repeat the number 3.", "--max-new-tokens", "8")
    assert said.returncode == 0, said.stderr
    scored = _cut_off(
        "eval", "--adapter", "offline", "--data", str(alpaca_file), "--limit", "4", "--max-new-tokens", "4", "--json"
    )
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["records"] == 4
