"""A base is quantized once: the stored copy has the same bits, and what is wrong with one is noticed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
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
from edgepeft.engine.model import copy_writer
from edgepeft.engine.model import load as loading
from edgepeft.engine.model.frozen import DenseWeight, Int8Weight, Nf4Weight, bitsandbytes_functional
from edgepeft.engine.model.load import LoadedModel, load_model
from edgepeft.engine.model.safetensors_stream import SafetensorsStream
from edgepeft.memory.chunks import NF4_BLOCK
from edgepeft.models.quantized_copy import METADATA_KEY, find_copy
from edgepeft.models.store import ModelEntry, add_model, remove_model
from edgepeft.runs.events import Warned
from tiny import write_tiny_model
from training_runs import of_type, tiny_run, train

CPU = torch.device("cpu")
IDS = torch.randint(0, 250, (2, 13), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def base(tiny_model: Path) -> ModelEntry:
    return add_model(tiny_model)


def load(entry: ModelEntry, precision: Any = "nf4", **options: Any) -> LoadedModel:
    return load_model(entry, **{"precision": precision, "compute_dtype": "bf16", "device": CPU, **options})


def told_by(entry: ModelEntry, precision: Any = "nf4") -> list[str]:
    """What a load warns of."""
    words: list[str] = []
    load(entry, precision, warn=words.append)
    return words


def copy_file(entry: ModelEntry, precision: str = "nf4") -> Path:
    return Path(entry.folder) / "quantized" / precision / "cpu.safetensors"


def forget(entry: ModelEntry) -> None:
    shutil.rmtree(Path(entry.folder) / "quantized")


def files_of(entry: ModelEntry) -> list[Path]:
    return [path for path in (Path(entry.folder) / "quantized").rglob("*") if path.is_file()]


def held(loaded: LoadedModel) -> dict[str, list[Tensor]]:
    """Every tensor of every linear."""
    found: dict[str, list[Tensor]] = {}
    for path, linear in loaded.linears().items():
        weight = linear.weight_source
        if isinstance(weight, Nf4Weight):
            found[path] = [weight.packed, weight.absmax, *(weight.nested or ())]
        elif isinstance(weight, Int8Weight):
            found[path] = [weight.codes, weight.absmax]
        else:
            assert isinstance(weight, DenseWeight)
            found[path] = [weight.values]
    return found


def logits(loaded: LoadedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = loaded.model(IDS).logits
    return found


def assert_same(one: LoadedModel, other: LoadedModel) -> None:
    mine, others = held(one), held(other)
    assert list(mine) == list(others)
    for path, tensors in mine.items():
        for tensor, expected in zip(tensors, others[path], strict=True):
            assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
            assert torch.equal(tensor, expected), path
    assert torch.equal(logits(one), logits(other))


@pytest.fixture
def never_quantizing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def begin() -> None:
        def refuse(*arguments: Any) -> None:
            raise AssertionError("quantized again")

        monkeypatch.setattr(loading, "freeze", refuse)

    return begin


# --- the same bits ---


@pytest.mark.parametrize("precision", ["nf4", "int8"])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_the_second_load_has_the_bits_of_the_first_and_quantizes_nothing(
    tmp_path: Path, precision: Any, copied: bool, dense: bool, never_quantizing: Callable[[], None]
) -> None:
    # 3 × 43 entries: neither blocks of 64 nor bytes of two codes come out even.
    folder = write_tiny_model(tmp_path / "m", intermediate_size=43, tie_word_embeddings=False)
    entry = add_model(folder, copy=copied)
    first = load(entry, precision, dense_values=dense)
    assert [path.name for path in files_of(entry)] == ["cpu.safetensors"]
    never_quantizing()
    assert_same(load(entry, precision, dense_values=dense), first)


def test_every_kind_of_load_shares_one_copy(base: ModelEntry, never_quantizing: Callable[[], None]) -> None:
    first = load(base, dense_values=True)
    never_quantizing()
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
    base: ModelEntry, damage: str, never_quantizing: Callable[[], None]
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
    never_quantizing()
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


def check_unstored(entry: ModelEntry, expected: LoadedModel, *why: str) -> None:
    """A load works and says in one word why it stored nothing."""
    words: list[str] = []
    assert_same(load(entry, warn=words.append), expected)
    assert len(words) == 1
    assert words[0].startswith("the nf4 copy of tiny-model is not stored, so the next load quantizes again: ")
    assert all(text in words[0] for text in why)
    assert find_copy(entry, "nf4", "cpu") is None


@pytest.fixture
def expected(base: ModelEntry) -> LoadedModel:
    loaded = load(base)
    forget(base)
    return loaded


def test_too_little_space_is_told_and_nothing_written(
    base: ModelEntry, expected: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(copy_writer.shutil, "disk_usage", lambda path: usage(10, 9, 2**30))
    check_unstored(base, expected, "it needs", "1.00 GiB are free")
    assert not files_of(base)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_store_that_may_not_be_written_is_told(
    base: ModelEntry, expected: LoadedModel, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(self: Path, *arguments: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    check_unstored(base, expected, "no permission to write here")


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="permissions bind only a plain Unix user")
def test_a_folder_without_permission_to_write_is_told(base: ModelEntry, expected: LoadedModel) -> None:
    Path(base.folder).chmod(0o555)
    try:
        check_unstored(base, expected, "no permission to write here")
    finally:
        Path(base.folder).chmod(0o755)


def test_something_in_the_way_is_told(base: ModelEntry, expected: LoadedModel) -> None:
    (Path(base.folder) / "quantized").write_text("a file")
    check_unstored(base, expected, "File exists")


def test_a_copy_in_a_store_that_may_not_be_written_is_used(
    base: ModelEntry, monkeypatch: pytest.MonkeyPatch, never_quantizing: Callable[[], None]
) -> None:
    first = load(base)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(copy_writer, "atomic_path", refuse)
    never_quantizing()
    words: list[str] = []
    assert_same(load(base, warn=words.append), first)
    assert not words


@pytest.mark.parametrize("when", [0, 1, 30])
def test_a_disk_that_fills_up_ends_the_writing_and_not_the_load(
    base: ModelEntry, expected: LoadedModel, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    write, count = SafetensorsStream.write, [0]

    def fill(self: SafetensorsStream, name: str, tensor: Tensor) -> None:
        count[0] += 1
        if count[0] > when:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, tensor)

    monkeypatch.setattr(SafetensorsStream, "write", fill)
    check_unstored(base, expected, "No space left on device")
    assert count[0] == when + 1
    assert not files_of(base)


def test_a_disk_that_refuses_the_last_bytes_leaves_nothing(
    base: ModelEntry, expected: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    check_unstored(base, expected, "the disk is full")
    assert not files_of(base)


# --- interruptions, and others who do the same ---


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), MemoryError("full")])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_an_interrupted_load_leaves_nothing(base: ModelEntry, interruption: BaseException, share: float) -> None:
    def stop(what: str, fraction: float | None) -> None:
        if fraction == share:
            raise interruption

    with pytest.raises(type(interruption)):
        load(base, progress=stop)
    assert not files_of(base)
    assert told_by(base) == []
    assert [path.name for path in files_of(base)] == ["cpu.safetensors"]


KILLED = """
import os, signal, sys
import torch
from edgepeft.engine.model.load import load_model
from edgepeft.models.store import find_model

def die(what, share):
    if share == 0.5:
        os.kill(os.getpid(), signal.SIGKILL)

load_model(find_model(sys.argv[1]), precision="nf4", compute_dtype="bf16", device=torch.device("cpu"), progress=die)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals as Unix has them")
def test_what_a_killed_process_left_is_not_used_and_goes_once_it_is_old(
    base: ModelEntry, expected: LoadedModel
) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, base.name], check=False)
    assert done.returncode == -9
    (left,) = files_of(base)
    assert left.suffix == ".tmp"
    words: list[str] = []
    assert_same(load(base, warn=words.append), expected)
    assert not words
    # It may belong to a process that is still writing.
    assert set(files_of(base)) == {left, copy_file(base)}
    long_ago = left.stat().st_mtime - 2 * 3600
    os.utime(left, (long_ago, long_ago))
    copy_file(base).unlink()
    load(base)
    assert files_of(base) == [copy_file(base)]


def test_two_loads_at_once_leave_one_good_copy(base: ModelEntry, expected: LoadedModel) -> None:
    words: list[str] = []
    others: list[LoadedModel] = []

    def another(what: str, share: float | None) -> None:
        if share == 0.5 and not others:
            others.append(load(base, warn=words.append))
            assert copy_file(base).is_file()

    assert_same(load(base, progress=another, warn=words.append), expected)
    assert_same(others[0], expected)
    assert not words
    assert files_of(base) == [copy_file(base)]
    assert_same(load(base), expected)


@pytest.mark.parametrize("again", [False, True])
def test_a_model_that_is_removed_meanwhile_does_not_come_back(
    tiny_model: Path, base: ModelEntry, expected: LoadedModel, again: bool
) -> None:
    def remove(what: str, share: float | None) -> None:
        if share == 0.5:
            remove_model(base.name)
            if again:
                add_model(tiny_model)

    words: list[str] = []
    assert_same(load(base, progress=remove, warn=words.append), expected)
    assert len(words) == 1
    assert Path(base.folder).exists() == again
    assert not files_of(base)


def test_a_run_says_that_nothing_could_be_stored(tmp_path: Path, base: ModelEntry) -> None:
    (Path(base.folder) / "quantized").write_text("a file")
    run = tiny_run(tmp_path, base, precision="nf4", max_steps=1)
    messages = [event.message for event in of_type(train(run), Warned)]
    assert any("the nf4 copy of tiny-model is not stored" in message for message in messages)
    (Path(base.folder) / "quantized").unlink()
    stored = tiny_run(tmp_path, base, "stored", precision="nf4", max_steps=1)
    assert not any("copy" in event.message for event in of_type(train(stored), Warned))
    assert copy_file(base).is_file()


MEASURE = """
import sys
from pathlib import Path
import torch
from edgepeft.engine.model.load import load_model
from edgepeft.models.store import ensure_model

def kilobytes(*names):
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(names))

entry = ensure_model(sys.argv[1])
load_model(ensure_model(sys.argv[2]), precision="nf4", compute_dtype="bf16", device=torch.device("cpu"))
before, peak = (kilobytes("RssAnon", "RssShmem"), kilobytes("RssFile")), [0, 0]
def watch(what, fraction):
    peak[0] = max(peak[0], kilobytes("RssAnon", "RssShmem") - before[0])
    peak[1] = max(peak[1], kilobytes("RssFile") - before[1])
loaded = load_model(entry, precision="nf4", compute_dtype="bf16", device=torch.device("cpu"), progress=watch)
print(sum(loaded.bytes_by_category().values()), peak[0] * 1024, peak[1] * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_the_second_load_reads_the_copy_and_needs_no_more_than_the_frozen_model(
    tmp_path: Path, tiny_model: Path
) -> None:
    folder = write_tiny_model(
        tmp_path / "m",
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=16,
        head_dim=64,
    )
    source = (folder / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", MEASURE, str(folder), str(tiny_model)]
    first, second = (
        [int(value) for value in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]
        for _ in range(2)
    )
    print(f"held, peak of anonymous memory, of mapped files: first {first}, second {second}, source {source}")
    # Nearly all of the source is linears: the first load maps them in, the second leaves them on the disk.
    assert first[2] > 0.9 * source
    assert second[2] < 0.1 * source
    assert second[1] < second[0] + 8 * 2**20
