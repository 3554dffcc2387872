"""LoRA files by the command line: in the library afterwards, or one line and nothing left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgepeft.library.audit import read_audit
from edgepeft.models.store import ModelEntry, add_model

V1 = "model.layers.1.self_attn.v_proj"


@pytest.fixture
def entry(tiny_model: Path) -> ModelEntry:
    return add_model(tiny_model, "tiny")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    path = tmp_path / "lora.safetensors"
    tensors = {f"{V1}.lora_A.weight": np.ones((2, 64), np.float32), f"{V1}.lora_B.weight": np.ones((32, 2), np.float32)}
    save_file(tensors, path)
    return path


def edgepeft(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "edgepeft", *arguments], capture_output=True, text=True)


def test_a_file_is_taken_over_and_chats(entry: ModelEntry, lora: Path, edgepeft_home: Path) -> None:
    done = edgepeft("adapters", "import", str(lora), "--name", "mine", "--base", "tiny", "--alpha", "4", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["reference"], result["base"], result["base_fingerprint"]) == ("mine@v1", "tiny", entry.fingerprint)
    assert result["imported"]["alpha_from"] == "--alpha"
    assert "the file does not tell" in result["warnings"][0]
    kept = load_file(edgepeft_home / "adapters" / "mine" / "v1" / "adapter_model.safetensors")
    assert set(kept) == {f"base_model.model.{V1}.lora_{side}.weight" for side in "AB"}
    assert [(line.action, line.detail) for line in read_audit("mine")] == [("imported", str(lora))]
    shown = edgepeft("adapters", "show", "mine")
    assert str(lora) in shown.stdout.replace("\n", "")
    chat = edgepeft("chat", "--adapter", "mine", "--prompt", "hello", "--max-new-tokens", "3", "--precision", "fp32")
    assert chat.returncode == 0, chat.stderr
    assert list((edgepeft_home / "cache" / "importing").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--base", "tiny"], 3, "does not say the alpha of model.layers.1.self_attn.v_proj"),
        (["--alpha", "4"], 2, "does not say which base model it belongs to. Add --base MODEL"),
        (["--alpha", "-1", "--base", "tiny"], 2, "an alpha of -1 is not possible"),
        (["--alpha", "4", "--base", "nope"], 3, "nope"),
    ],
)
def test_a_refusal_is_one_line(
    entry: ModelEntry, lora: Path, edgepeft_home: Path, arguments: list[str], code: int, said: str
) -> None:
    done = edgepeft("adapters", "import", str(lora), "--name", "mine", *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in " ".join(done.stderr.split())
    # A machine that is busy tells of its progress first.
    assert sum(line.startswith("edgepeft: ") for line in done.stderr.splitlines()) == 1
    assert not (edgepeft_home / "adapters" / "mine").exists()


def test_a_file_that_chat_is_given_has_to_be_imported_first(entry: ModelEntry, lora: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    save_file(load_file(lora), folder / "lora.safetensors")
    for place in (lora, folder):
        done = edgepeft("chat", "tiny", "--adapter", str(place), "--prompt", "hello")
        assert done.returncode == 3
        assert f"edgepeft adapters import {place} --name NAME --base MODEL" in " ".join(done.stderr.split())
