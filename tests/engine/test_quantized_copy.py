"""A base is quantized once: the stored copy has the same bits, and what is wrong with one is noticed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgepeft.engine.ledger import LiveBytes
from edgepeft.engine.model.frozen import Nf4Weight, bitsandbytes_functional
from edgepeft.memory.chunks import NF4_BLOCK
from edgepeft.models.quantized_copy import METADATA_KEY
from edgepeft.models.store import ModelEntry, add_model
from quantized_copies import CPU, assert_same, copy_file, files_of, forbid_quantizing, forget, load, logits, told_by
from tiny import write_tiny_model


@pytest.fixture
def base(tiny_model: Path) -> ModelEntry:
    return add_model(tiny_model)


# --- the same bits ---


@pytest.mark.parametrize("precision", ["nf4", "int8"])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_the_second_load_has_the_bits_of_the_first_and_quantizes_nothing(
    tmp_path: Path, precision: Any, copied: bool, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 3 × 43 entries: neither blocks of 64 nor bytes of two codes come out even.
    folder = write_tiny_model(tmp_path / "m", intermediate_size=43, tie_word_embeddings=False)
    entry = add_model(folder, copy=copied)
    first = load(entry, precision, dense_values=dense)
    assert [path.name for path in files_of(entry)] == ["cpu.safetensors"]
    forbid_quantizing(monkeypatch)
    assert_same(load(entry, precision, dense_values=dense), first)


def test_every_kind_of_load_shares_one_copy(base: ModelEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(base, dense_values=True)
    forbid_quantizing(monkeypatch)
    packed = load(base, compute_dtype="fp32")
    dense = load(base, dense_values=True)
    assert torch.equal(logits(dense), logits(first))
    assert all(isinstance(linear.weight_source, Nf4Weight) for linear in packed.linears().values())
    assert len(files_of(base)) == 1


def test_the_file_holds_what_bitsandbytes_makes(base: ModelEntry) -> None:
    load(base)
    stored = load_file(copy_file(base))
    source = load_file(Path(base.weights) / "model.safetensors")
    linears = [name for name in source if "_proj" in name]
    assert len(linears) == 14
    assert len(stored) == 1 + 5 * len(linears)
    for name in linears:
        packed, state = bitsandbytes_functional().quantize_4bit(
            source[name], blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=True
        )
        assert torch.equal(stored[name], packed.reshape(-1))
        assert torch.equal(stored[f"{name}.absmax"], state.absmax)
        assert torch.equal(stored[f"{name}.nested_absmax"], state.state2.absmax)
        assert torch.equal(stored[f"{name}.nested_offset"], state.offset)
        assert torch.equal(stored["absmax_map"], state.state2.code)
    with safe_open(copy_file(base), "pt") as opened:
        settings = json.loads(opened.metadata()[METADATA_KEY])
    assert settings == {
        "fingerprint": base.fingerprint,
        "precision": "nf4",
        "quant_type": "nf4",
        "device": "cpu",
        "block": 64,
        "absmax_block": 256,
        "double_quantization": True,
        "format": 1,
    }


def test_the_sources_linears_are_not_used_again(base: ModelEntry) -> None:
    first = load(base)
    path = Path(base.weights) / "model.safetensors"
    before = path.stat()
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    for name, value in tensors.items():
        if "_proj" in name:
            value.fill_(float("nan"))
    content = path.with_suffix(".new")
    save_file(tensors, content, metadata={"format": "pt"})
    # In place and with the old times: the store takes it for unchanged.
    path.write_bytes(content.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert_same(load(base), first)


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_what_was_read_is_in_memory_of_its_own_and_counted(base: ModelEntry, precision: Any) -> None:
    bitsandbytes_functional()
    ledgers: list[LiveBytes] = []
    for _ in range(2):
        with LiveBytes(CPU, others=False) as ledger:
            loaded = load(base, precision)
            shared_map = 256 * 4 if precision == "nf4" else 0
            assert ledger.live_bytes == sum(loaded.bytes_by_category().values()) + shared_map
        ledgers.append(ledger)
    assert ledgers[1].peak_bytes <= ledgers[0].peak_bytes
    assert ledgers[1].peak_bytes <= 1.01 * ledgers[1].live_bytes
    before = logits(loaded)
    path = copy_file(base, precision)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(logits(loaded), before)


def test_nothing_is_stored_of_what_is_not_quantized_here(base: ModelEntry) -> None:
    for precision in ("bf16", "fp32", "fp16"):
        load(base, precision)
    load(msgspec.structs.replace(base, stored_as="bnb-4bit"), "nf4")
    assert not files_of(base)


def test_storing_is_told(base: ModelEntry) -> None:
    first: list[str] = []
    load(base, progress=lambda what, share: first.append(what))
    assert "loading tiny-model, storing nf4" in first
    second: list[str] = []
    load(base, progress=lambda what, share: second.append(what))
    assert not any("storing" in what for what in second)


# --- copies that must not be used ---


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """Writes a copy again, its tensors and its settings changed."""
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    with safe_open(path, "pt") as opened:
        settings = json.loads(opened.metadata()[METADATA_KEY])
    change(tensors, settings)
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(settings)})


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def flip_first_code(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8 + int.from_bytes(content[:8], "little") + 256 * 4] ^= 16
    path.write_bytes(content)


NAME = "model.layers.1.mlp.up_proj.weight"

DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-7]), "cut short: 7 bytes"),
    "empty": (lambda path: path.write_bytes(b""), "not a safetensors file"),
    "no header": (lambda path: path.write_bytes(b"\0" * 5000), "not a safetensors file"),
    "too long": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "1 bytes too many"),
    "a bit at the end": (flip_last_byte, "are damaged"),
    "a bit at the beginning": (flip_first_code, "are damaged"),
    "unnamed": (lambda path: save_file(load_file(path), path), "does not say what it was made from"),
    "other weights": (
        lambda path: rewritten(path, lambda t, s: s.update(fingerprint="sha256:0")),
        "made from other weights",
    ),
    "other block": (lambda path: rewritten(path, lambda t, s: s.update(block=128)), "another block"),
    "other type": (lambda path: rewritten(path, lambda t, s: s.update(quant_type="fp4")), "another quant_type"),
    "single": (
        lambda path: rewritten(path, lambda t, s: s.update(double_quantization=False)),
        "another double_quantization",
    ),
    "other device": (lambda path: rewritten(path, lambda t, s: s.update(device="cuda")), "another device"),
    "newer format": (lambda path: rewritten(path, lambda t, s: s.update(format=2)), "another format"),
    "unknown setting": (lambda path: rewritten(path, lambda t, s: s.update(more=1)), "does not say what"),
    "missing": (lambda path: rewritten(path, lambda t, s: t.pop(f"{NAME}.absmax")), f"no tensor {NAME}.absmax"),
    "more": (lambda path: rewritten(path, lambda t, s: t.update(more=torch.ones(1))), "more tensors"),
    "other shape": (
        lambda path: rewritten(path, lambda t, s: t.update({NAME: t[NAME].view(2, -1)})),
        "another shape or dtype",
    ),
    "other dtype": (
        lambda path: rewritten(path, lambda t, s: t.update({NAME: t[NAME].view(torch.int8)})),
        "another shape or dtype",
    ),
    "other code": (lambda path: rewritten(path, lambda t, s: t["absmax_map"].mul_(2)), "another 8-bit code"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_copy_that_does_not_match_is_told_and_made_anew(
    base: ModelEntry, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(base)
    good = copy_file(base).read_bytes()
    change, why = DAMAGES[damage]
    change(copy_file(base))
    assert copy_file(base).read_bytes() != good
    words: list[str] = []
    assert_same(load(base, warn=words.append), first)
    assert len(words) == 1
    assert words[0].startswith("the stored nf4 copy of tiny-model is not used, it is quantized again: ")
    assert why in words[0]
    assert copy_file(base).read_bytes() == good
    forbid_quantizing(monkeypatch)
    assert told_by(base) == []


def test_the_copy_of_another_model_is_not_used(tmp_path: Path, base: ModelEntry) -> None:
    other = add_model(write_tiny_model(tmp_path / "other", seed=1))
    load(base)
    load(other)
    expected = load(base)
    shutil.copy(copy_file(other), copy_file(base))
    words: list[str] = []
    assert_same(load(base, warn=words.append), expected)
    assert "made from other weights" in words[0]


def test_once_the_weights_have_changed_nothing_is_used_and_nothing_stored(base: ModelEntry) -> None:
    load(base)
    stored = copy_file(base).read_bytes()
    write_tiny_model(Path(base.weights), seed=1)
    words: list[str] = []
    changed = load(base, warn=words.append)
    assert len(words) == 2
    assert all("the weights of tiny-model have changed since it was added" in word for word in words)
    assert copy_file(base).read_bytes() == stored
    forget(base)
    again = load(base)
    assert not files_of(base)
    assert_same(again, changed)


def test_weights_that_change_while_they_are_read_are_not_stored(base: ModelEntry) -> None:
    words: list[str] = []

    def change(what: str, share: float | None) -> None:
        if share == 0.5:
            os.utime(Path(base.weights) / "model.safetensors")
            write_tiny_model(Path(base.weights), seed=1)

    load(base, progress=change, warn=words.append)
    assert not files_of(base)
    assert "have changed" in words[0]


# --- places that take no copy ---
