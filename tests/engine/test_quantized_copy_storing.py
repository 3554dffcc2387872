"""A quantized copy that cannot be stored, or only in part, is told of and costs nothing but the next load's time."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from edgepeft.engine.model import copy_writer
from edgepeft.engine.model.load import LoadedModel
from edgepeft.engine.model.safetensors_stream import SafetensorsStream
from edgepeft.models.quantized_copy import find_copy
from edgepeft.models.store import ModelEntry, add_model, remove_model
from edgepeft.runs.events import Warned
from measured_load import measure_load, write_wide_model
from quantized_copies import assert_same, copy_file, files_of, forbid_quantizing, forget, load, told_by
from training_runs import of_type, tiny_run, train


@pytest.fixture
def base(tiny_model: Path) -> ModelEntry:
    return add_model(tiny_model)


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


def test_a_copy_in_a_store_that_may_not_be_written_is_used(base: ModelEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(base)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(copy_writer, "atomic_path", refuse)
    forbid_quantizing(monkeypatch)
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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_the_second_load_reads_the_copy_and_needs_no_more_than_the_frozen_model(
    tmp_path: Path, tiny_model: Path
) -> None:
    folder = write_wide_model(tmp_path / "m")
    source = (folder / "model.safetensors").stat().st_size
    first, second = (measure_load(folder, tiny_model) for _ in range(2))
    print(f"first {first}, second {second}, source {source}")
    # Nearly all of the source is linears: the first load maps them in, the second leaves them on the disk.
    assert first.peak_mapped > 0.9 * source
    assert second.peak_mapped < 0.1 * source
    assert second.peak < second.held + 8 * 2**20
