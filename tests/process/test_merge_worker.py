"""Merges and exports by the command line, in a process of their own: what is there afterwards, and what is not."""

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
import pytest
from safetensors.numpy import load_file, save_file

from adapter_files import make_card, write_peft_folder
from edgepeft.library.store import write_card
from edgepeft.models.store import ModelEntry, add_model, find_model
from tiny import write_split_tokenizer, write_tiny_model


@pytest.fixture
def entry(tiny_model: Path) -> ModelEntry:
    return add_model(tiny_model, "tiny")


@pytest.fixture
def adapter(entry: ModelEntry, tmp_path: Path) -> Path:
    made = write_peft_folder(tmp_path / "made", entry.shape)
    path = made / "adapter_model.safetensors"
    save_file({name: tensor * 0.05 for name, tensor in load_file(path).items()}, path)
    write_card(made, make_card(base_fingerprint=entry.fingerprint))
    return made


def edgepeft(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "edgepeft", *arguments], capture_output=True, text=True, **options)


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_merged_folder_can_be_added_and_is_what_was_measured(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    done = edgepeft("adapters", "merge", str(adapter), "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["into"], result["dtype"], result["changed_tensors"]) == ("dequantized", "bf16", 14)
    assert 0 <= result["drift"]["mean_kl"] < 0.001
    added = add_model(out, "merged")
    assert added.stored_as == "bf16"
    assert find_model("merged").shape == find_model("tiny").shape
    assert left_behind(tmp_path) == []
    again = edgepeft("adapters", "merge", str(adapter), "--out", str(out), "--force")
    assert again.returncode == 3
    assert again.stderr.startswith("edgepeft: ")
    assert "holds the files of the model merged" in again.stderr


def test_factors_become_part_of_the_weights(entry: ModelEntry, tmp_path: Path) -> None:
    made, out = tmp_path / "made", tmp_path / "merged"
    made.mkdir()
    random = np.random.default_rng(0)
    sizes = {"self_attn.k_proj": (32, 1), "self_attn.v_proj": (32, 1), "mlp.down_proj": (1, 128)}
    factors = {
        f"base_model.model.model.layers.{layer}.{name}.ia3_l": random.uniform(0.8, 1.2, size).astype(np.float32)
        for layer in range(2)
        for name, size in sizes.items()
    }
    save_file(factors, made / "adapter_model.safetensors")
    named = {"target_modules": ["down_proj", "k_proj", "v_proj"], "feedforward_modules": ["down_proj"]}
    (made / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", **named}))
    write_card(made, make_card(base_fingerprint=entry.fingerprint, precision="bf16"))
    done = edgepeft("adapters", "merge", str(made), "--out", str(out), "--dtype", "fp32")
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    assert "merged into the original weights: it was trained on unquantized weights (bf16)" in shown
    assert "6 of 20 tensors changed, the others are the base's" in shown
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (entry.weights, out))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {f"model.layers.{layer}.{name}.weight" for layer in range(2) for name in sizes}
    record = json.loads((out / "edgepeft_merge.json").read_text())
    assert (record["method"], record["changed_tensors"], record["into"]) == ("ia3", 6, "original")
    assert record["drift"]["mean_kl"] < 1e-4
    plain = edgepeft("adapters", "export", str(made), "--format", "peft", "--out", str(tmp_path / "plain"), "--json")
    assert plain.returncode == 0, plain.stderr
    assert (json.loads(plain.stdout)["method"], json.loads(plain.stdout)["modules"]) == ("ia3", 6)
    assert load_file(tmp_path / "plain" / "adapter_model.safetensors").keys() == factors.keys()
    refused = edgepeft("adapters", "export", str(made), "--format", "gguf", "--out", str(tmp_path / "a.gguf"))
    assert refused.returncode == 3
    assert "llama.cpp reads plain LoRA, and this adapter is of the method ia3" in " ".join(refused.stderr.split())
    assert left_behind(tmp_path) == []


def test_a_refused_merge_leaves_nothing(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    refused = edgepeft("adapters", "merge", str(adapter), "--out", str(out), "--into", "original", "--limit", "1e-9")
    assert refused.returncode == 3
    assert "the limit is 1e-09. Nothing was kept" in " ".join(refused.stderr.split())
    assert refused.stdout == ""
    assert not out.exists()
    assert left_behind(tmp_path) == []


@pytest.mark.slow
def test_a_gguf_model_is_one_file_that_can_be_added(entry: ModelEntry, adapter: Path, tmp_path: Path) -> None:
    write_split_tokenizer(Path(entry.weights))
    add_model(entry.weights, "tiny")
    out = tmp_path / "merged.gguf"
    done = edgepeft("adapters", "merge", str(adapter), "--out", str(out), "--format", "gguf-f16", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["drift"]["mean_kl"] < 0.01
    assert left_behind(tmp_path) == []
    assert add_model(out, "from-gguf").shape.parameters == entry.shape.parameters


def test_an_export_is_put_in_place(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "lora.gguf"
    done = edgepeft("adapters", "export", str(adapter), "--format", "gguf", "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rank"] == 4
    assert out.read_bytes()[:4] == b"GGUF"
    assert left_behind(tmp_path) == []


def test_an_error_in_the_process_is_one_line(adapter: Path, tmp_path: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"][0, 0] = float("nan")
    save_file(tensors, path)
    done = edgepeft("adapters", "merge", str(adapter), "--out", str(tmp_path / "merged"))
    assert done.returncode == 3
    assert "holds values that are not finite numbers" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert left_behind(tmp_path) == []


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_an_interrupted_merge_leaves_nothing(tmp_path: Path) -> None:
    base = write_tiny_model(
        tmp_path / "wide",
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=16,
        head_dim=64,
    )
    entry = add_model(base, "wide")
    adapter = write_peft_folder(tmp_path / "made", entry.shape)
    command = [sys.executable, "-m", "edgepeft", "adapters", "merge", str(adapter), "--out", str(tmp_path / "merged")]
    command += ["--base", entry.name]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".merged.*/model/*.safetensors")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    # As a terminal does: the whole group, so the worker too.
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == b""
    assert not (tmp_path / "merged").exists()
    assert left_behind(tmp_path) == []
