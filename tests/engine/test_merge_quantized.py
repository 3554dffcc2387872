"""Merging into bases that training quantized, and into bases that were quantized elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from edgepeft.engine.combine.base_files import BaseFiles
from edgepeft.engine.combine.outline import open_outline, shapes_of, trained_values
from edgepeft.engine.model.frozen import Nf4Weight
from edgepeft.errors import BadInput
from edgepeft.methods import LoraConfig
from edgepeft.models.store import ModelEntry
from merging import adapted_logits, entry_of, folder_logits, load, merge, write_adapter
from tiny import write_tokenizer


@pytest.fixture
def entry(tiny_model: Path) -> ModelEntry:
    return entry_of(tiny_model)


@pytest.fixture
def adapter(entry: ModelEntry, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", entry)


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_dequantized_keeps_what_training_saw_and_original_does_not(
    entry: ModelEntry, adapter: Path, tmp_path: Path, precision: Any
) -> None:
    expected = adapted_logits(entry, adapter, precision, "fp32")
    trained = {"precision": precision, "compute_dtype": "fp32"}
    kept = merge(entry, adapter, tmp_path / "a" / "kept", into="dequantized", **trained)
    torch.testing.assert_close(folder_logits(tmp_path / "a" / "kept"), expected, rtol=1e-5, atol=1e-5)
    other = merge(entry, adapter, tmp_path / "b" / "other", into="original", **trained)
    assert kept.drift.mean_kl < 1e-9
    assert other.drift.mean_kl > 1e-6
    assert (kept.changed, other.changed) == (14, 14)


def test_with_dequantized_every_linear_is_what_training_saw(entry: ModelEntry, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", entry, LoraConfig(rank=4, targets=("q_proj",)))
    merged = merge(
        entry, adapter, tmp_path / "a" / "b", into="dequantized", dtype="bf16", precision="nf4", compute_dtype="bf16"
    )
    found = load_file(tmp_path / "a" / "b" / "model.safetensors")
    for path, linear in load(entry, "nf4", "bf16").linears().items():
        seen = linear.weight_source.materialize(torch.empty(linear.weight_source.shape, dtype=torch.bfloat16))
        assert torch.equal(found[f"{path}.weight"], seen) == ("q_proj" not in path), path
    assert merged.changed == 14
    assert merged.drift.mean_kl < 1e-4


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_stored_copy_is_read_instead_of_quantizing(
    entry: ModelEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    load(entry, "nf4", "bf16")
    files, shapes = BaseFiles(entry), shapes_of(open_outline(entry))
    names = {path: f"{path}.weight" for path in shapes}
    expected = {}
    with trained_values(entry, files, names, shapes, "nf4", "bf16") as values:
        expected = {path: values(path) for path in shapes}
    stored = Path(entry.folder) / "quantized" / "nf4" / "cpu.safetensors"
    if kind == "cuda":
        # As if a card had made it: its metadata says so.
        content = stored.read_bytes().replace(b'\\"device\\":\\"cpu\\"', b'\\"device\\":\\"cuda\\"')
        length = int.from_bytes(content[:8], "little") + 1
        header = content[8 : 8 + length]
        padded = header + b" " * (-len(header) % 8)
        stored.with_name("cuda.safetensors").write_bytes(
            len(padded).to_bytes(8, "little") + padded + content[8 + length :]
        )
        stored.unlink()
    monkeypatch.setattr(Nf4Weight, "quantize", lambda *_: pytest.fail("quantized again"))
    with trained_values(entry, files, names, shapes, "nf4", "bf16") as values:
        for path, tensor in expected.items():
            assert torch.equal(values(path), tensor)


def test_a_damaged_copy_is_quantized_again(entry: ModelEntry) -> None:
    load(entry, "nf4", "bf16")
    files, shapes = BaseFiles(entry), shapes_of(open_outline(entry))
    names = {path: f"{path}.weight" for path in shapes}
    with trained_values(entry, files, names, shapes, "nf4", "bf16") as values:
        expected = {path: values(path) for path in shapes}
    stored = Path(entry.folder) / "quantized" / "nf4" / "cpu.safetensors"
    content = bytearray(stored.read_bytes())
    content[-5000] ^= 255
    stored.write_bytes(content)
    with trained_values(entry, files, names, shapes, "nf4", "bf16") as values:
        for path, tensor in expected.items():
            assert torch.equal(values(path), tensor)


@pytest.mark.parametrize(
    ("settings", "precision"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, "nf4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False}, "nf4"),
        ({"load_in_8bit": True}, "int8"),
    ],
)
@pytest.mark.parametrize("into", ["original", "dequantized"])
def test_what_bitsandbytes_packed_is_merged_as_values(
    tiny_model: Path, tmp_path: Path, settings: dict[str, Any], precision: Any, into: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model, quantization_config=BitsAndBytesConfig(**settings), device_map={"": "cpu"}, dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "bnb")
    write_tokenizer(tmp_path / "bnb")
    entry = entry_of(tmp_path / "bnb")
    adapter = write_adapter(tmp_path / "adapter", entry)
    trained = {"precision": precision, "compute_dtype": "fp32"}
    merged = merge(entry, adapter, tmp_path / "a" / "b", into=into, **trained)
    config = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert "quantization_config" not in config
    found = folder_logits(tmp_path / "a" / "b")
    torch.testing.assert_close(found, adapted_logits(entry, adapter, precision), rtol=1e-5, atol=1e-5)
    assert merged.drift.mean_kl < 1e-9


def test_fp8_blocks_are_merged_as_values(tiny_model: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_model / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        rows, columns = tensors[name].shape
        blocks = tensors[name].view(rows // 32, 32, columns // 32, 32)
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        tensors[name], tensors[f"{name}_scale_inv"] = codes.reshape(rows, columns), scale
    save_file(tensors, tiny_model / "model.safetensors")
    config = json.loads((tiny_model / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [32, 32],
        "activation_scheme": "dynamic",
    }
    (tiny_model / "config.json").write_text(json.dumps(config))
    entry = entry_of(tiny_model)
    adapter = write_adapter(tmp_path / "adapter", entry)
    merge(entry, adapter, tmp_path / "a" / "b")
    found = folder_logits(tmp_path / "a" / "b")
    torch.testing.assert_close(found, adapted_logits(entry, adapter), rtol=1e-4, atol=1e-4)
    # What training in NF4 saw is made of the values in the dtype of its products.
    kept = merge(entry, adapter, tmp_path / "b" / "b", into="dequantized", precision="nf4", compute_dtype="bf16")
    assert kept.drift.mean_kl < 1e-9


def test_other_quantizations_are_refused(entry: ModelEntry, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="stored as mxfp4, which cannot be merged into yet"):
        BaseFiles(msgspec.structs.replace(entry, stored_as="mxfp4"))
