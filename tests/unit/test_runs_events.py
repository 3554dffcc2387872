"""The event file: what is written is what is read, whatever happens in between."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepeft.errors import DiskProblem, ExitCode
from edgepeft.runs.events import SCHEMA, Event, Failed, Finished, PhaseChanged, Started, StepDone, Warned
from edgepeft.runs.events_file import (
    EventWriter,
    Follower,
    decode_event,
    encode_event,
    read_events,
    read_last_events,
)
from toy_run import toy_step

STARTED = Started(steps=9, device="cpu", versions={})
st.register_type_strategy(int, st.integers(-(2**63), 2**63 - 1))
events = st.one_of(
    [
        st.builds(kind, **{name: st.from_type(hint) for name, hint in get_type_hints(kind).items() if name[0] != "_"})
        for kind in get_args(Event)
    ]
)


def _same(first: Any, second: Any) -> bool:
    """Equality in which NaN equals NaN, and what JSON cannot say (infinities) equals NaN too."""
    if isinstance(first, float) and not math.isfinite(first):
        return second is None or (isinstance(second, float) and math.isnan(second))
    return bool(first == second)


@given(events)
def test_an_event_survives_the_codec(event: Event) -> None:
    line = encode_event(event)
    assert line.count(b"\n") == 1
    found = decode_event(line)
    assert type(found) is type(event)
    ours, theirs = msgspec.structs.asdict(event), msgspec.structs.asdict(found)
    assert all(_same(ours[field], theirs[field]) for field in ours)


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b"3", b'{"type":"step"}', b'{"type":"step","step":"x"}', b"\xff\xfe", b"{}"]
)
def test_damaged_lines_are_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match="not"):
        decode_event(line)


def test_unknown_types_and_fields_are_from_a_later_version() -> None:
    assert decode_event(b'{"type":"hologram","x":1}') is None
    assert decode_event(b'{"type":"warning","message":"m","later":1}') == Warned(message="m")


def test_a_loss_that_is_not_finite_is_read_as_nan() -> None:
    found = decode_event(encode_event(toy_step(1, math.inf)))
    assert isinstance(found, StepDone)
    assert math.isnan(found.loss)


def test_text_that_is_not_unicode_does_not_end_a_run() -> None:
    found = decode_event(encode_event(Warned(message="path /data/\udcff.jsonl")))
    assert found == Warned(message="path /data/?.jsonl")


def test_the_first_line_says_the_schema(tmp_path: Path) -> None:
    with EventWriter(tmp_path / "e") as writer:
        writer.write(STARTED)
    first = msgspec.json.decode((tmp_path / "e").read_bytes())
    assert first["schema"] == SCHEMA
    assert first["time"] > 1e9


def test_each_event_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[bytes] = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: (writes.append(data), write(descriptor, data))[1])
    with EventWriter(tmp_path / "e") as writer:
        writer.write(STARTED)
        writer.write(toy_step(1))
    assert [line.count(b"\n") for line in writes] == [1, 1]


def test_a_line_torn_by_a_kill_is_ended_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "e"
    with EventWriter(path) as writer:
        writer.write(STARTED)
        writer.write(toy_step(1))
    path.write_bytes(path.read_bytes()[:-20])
    assert [type(event) for event in read_events(path)] == [Started]
    with EventWriter(path) as writer:
        writer.write(toy_step(2))
    follower = Follower(path)
    assert [type(event) for event in follower.read()] == [Started, StepDone]
    assert follower.skipped == 1


def test_a_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "e"
    path.write_bytes(encode_event(STARTED) + encode_event(toy_step(1)).rstrip(b"\n"))
    with EventWriter(path) as writer:
        writer.write(toy_step(2))
    assert [getattr(event, "step", None) for event in read_events(path)] == [0, 1, 2]


def test_the_follower_waits_for_the_rest_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "e"
    follower = Follower(path)
    assert follower.read() == []
    line = encode_event(Warned(message="ünfertig"))
    cut = line.index("ü".encode()) + 1
    path.write_bytes(line[:cut])
    assert follower.read() == []
    with path.open("ab") as file:
        file.write(line[cut:] + encode_event(toy_step(1))[:10])
    assert follower.read() == [Warned(message="ünfertig")]
    assert follower.read() == []
    assert follower.skipped == 0


@given(cuts=st.lists(st.integers(0, 2000), max_size=8))
def test_any_slicing_reads_the_same(tmp_path_factory: pytest.TempPathFactory, cuts: list[int]) -> None:
    whole = [STARTED, *(toy_step(step) for step in range(1, 5)), Failed(message="m", exit_code=1)]
    content = b"".join(map(encode_event, whole))
    path = tmp_path_factory.mktemp("slices") / "e"
    follower, found = Follower(path), []
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(content)], strict=True):
        with path.open("ab") as file:
            file.write(content[start:end])
        found += follower.read()
    assert found == whole


def test_the_follower_survives_truncation_and_replacement(tmp_path: Path) -> None:
    path = tmp_path / "e"
    path.write_bytes(encode_event(STARTED) + encode_event(toy_step(1)))
    follower = Follower(path)
    assert len(follower.read()) == 2
    path.write_bytes(encode_event(Warned(message="anew")))
    assert follower.read() == [Warned(message="anew")]
    other = tmp_path / "other"
    other.write_bytes(encode_event(STARTED) * 5)
    other.replace(path)
    assert len(follower.read()) == 5
    assert follower.restarts == 2


def test_the_tail_of_a_long_file_begins_at_a_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "e"
    path.write_bytes(encode_event(STARTED) + b"".join(encode_event(toy_step(step)) for step in range(1, 1001)))
    found, whole = read_last_events(path, 4096)
    steps = [event.step for event in found if isinstance(event, StepDone)]
    assert not whole
    assert steps == list(range(1001 - len(steps), 1001))
    assert 5 < len(steps) < 50
    assert read_last_events(tmp_path / "none") == ([], True)


def test_a_full_disk_is_said_and_the_next_line_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "e"
    writer = EventWriter(path)
    writer.write(STARTED)
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def half(descriptor: int, data: bytes) -> int:
        return write(descriptor, data[:7])

    for broken in (full, half):
        monkeypatch.setattr(os, "write", broken)
        with pytest.raises(DiskProblem, match="disk is full") as problem:
            writer.write(PhaseChanged(name="train"))
        assert problem.value.exit_code == ExitCode.DISK
    monkeypatch.setattr(os, "write", write)
    writer.write(toy_step(1))
    writer.close()
    follower = Follower(path)
    assert [type(event) for event in follower.read()] == [Started, StepDone]
    assert follower.skipped == 1


def test_finished_needs_its_numbers() -> None:
    with pytest.raises(ValueError, match="train_seconds"):
        decode_event(b'{"type":"finished","step":1,"adapter":"a"}')
    assert Finished.__struct_config__.tag == "finished"
