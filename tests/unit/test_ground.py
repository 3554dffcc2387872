"""Units, paths, errors and settings."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgepeft import settings as config
from edgepeft.errors import BadInput, DiskProblem, DoesNotFit, EdgepeftError, ExitCode, UsageError, error_for_code
from edgepeft.paths import as_name, atomic_path, builtin_profiles, check_name, home, write_atomic
from edgepeft.units import (
    GIB,
    format_age,
    format_bytes,
    format_count,
    format_gib,
    format_seconds,
    parse_bytes,
    parse_seconds,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [("20GiB", 20 * GIB), ("20 GB", 20 * 10**9), ("1.5gib", 3 * GIB // 2), ("512 MiB", GIB // 2), ("7B", 7)],
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["20", "GiB", "-1GiB", "0GB", "20 parsecs", "", "1e3GB", "nan GiB"])
def test_sizes_that_cannot_be_meant_are_refused_with_advice(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_bytes(text, where="--budget")
    assert caught.value.exit_code == ExitCode.USAGE
    assert str(caught.value).startswith("--budget: ")
    assert caught.value.hint


@given(st.integers(min_value=1, max_value=1 << 60))
def test_a_formatted_size_reads_back_within_a_percent(size: int) -> None:
    assert abs(parse_bytes(format_bytes(size)) - size) <= 0.01 * size + 0.5


def test_numbers_are_written_for_people() -> None:
    assert format_gib(11.1 * GIB) == "11.10 GiB"
    assert [format_bytes(value) for value in (0, 900, 1536, 20 << 20, 5 << 30)] == [
        "0 B",
        "900 B",
        "1.50 KiB",
        "20.0 MiB",
        "5.00 GiB",
    ]
    assert [format_count(value) for value in (812, 4600, 134_515_008, 8_030_261_248)] == [
        "812",
        "4.60 k",
        "134.5 M",
        "8.03 B",
    ]
    assert [format_seconds(value) for value in (41.2, 365, 7800, 273600, float("inf"))] == [
        "41 s",
        "6 min 05 s",
        "2 h 10 min",
        "3 d 4 h",
        "n/a",
    ]
    assert parse_seconds("30min") == 1800
    assert [format_age(value) for value in (-5, 41, 365, 7800, 273600)] == ["0 s", "41 s", "6 min", "2 h", "3 d"]


@pytest.mark.parametrize("name", ["a", "db-triage", "x.1_y", "0" * 64])
def test_good_names_pass(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "../x", "A", "-a", ".hidden", "a/b", "0" * 65, "ä", "a b", "a\n", "con", "nul.txt", "com1", "lpt9.x", "ends."],
)
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        check_name(name)


@pytest.mark.parametrize("name", ["console", "nul-1", "com", "aux_2", "prn1"])
def test_words_that_begin_like_a_device_are_names(name: str) -> None:
    assert check_name(name) == name


def test_a_device_of_windows_becomes_a_name() -> None:
    assert as_name("NUL") == "my-nul"


@given(st.text(max_size=100))
def test_any_text_becomes_a_valid_name(text: str) -> None:
    assert check_name(as_name(text)) == as_name(text)


def test_home_follows_the_environment(edgepeft_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert home().runs == edgepeft_home / "runs"
    monkeypatch.delenv("EDGEPEFT_HOME")
    assert home().runs.is_absolute()
    assert not home().runs.is_relative_to(edgepeft_home)
    assert (builtin_profiles() / "gpus").is_dir()


def test_a_home_below_a_file_is_a_disk_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskProblem, match="cannot be made"):
        write_atomic(tmp_path / "file" / "folder" / "x", b"")


def _write_half(path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError("half way")


def test_an_atomic_write_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "kept.txt"
    write_atomic(path, "old")
    with pytest.raises(RuntimeError, match="half way"):
        _write_half(path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept.txt"]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskProblem, match="disk is full") as caught:
        write_atomic(tmp_path / "file", b"x")
    assert caught.value.exit_code == ExitCode.DISK
    assert list(tmp_path.iterdir()) == []


def test_an_error_survives_a_process_boundary() -> None:
    error = error_for_code(ExitCode.DOES_NOT_FIT, "too big", hint="Take a smaller one")
    assert isinstance(error, DoesNotFit)
    assert str(error) == "too big. Take a smaller one."
    assert type(error_for_code(99, "?")) is EdgepeftError


def test_settings_come_from_the_file_and_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.settings() == config.Settings()
    config.store_setting("budget", "20GiB")
    config.store_setting("intent", "speed")
    assert config.settings().budget == "20GiB"
    monkeypatch.setenv("EDGEPEFT_BUDGET", "10GiB")
    assert config.settings() == config.Settings(budget="10GiB", intent="speed")
    config.store_setting("budget", None)
    assert config.stored_settings() == config.Settings(intent="speed")


def test_settings_are_shown_with_their_origin_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    config.store_setting("budget", "20GiB")
    config.store_setting("keys.app.plan", "f9")
    monkeypatch.setenv("EDGEPEFT_INTENT", "speed")
    shown = {setting.key: (setting.value, setting.origin) for setting in config.shown_settings()}
    assert shown["budget"] == ("20GiB", "config.toml")
    assert shown["intent"] == ("speed", "environment")
    assert shown["gpu"] == (None, "default")
    assert list(shown)[-1] == "keys.app.plan"
    for key, value in (("budget", "20"), ("co2_grams_per_kwh", "-1"), ("co2_grams_per_kwh", "much"), ("glyphs", "x")):
        with pytest.raises(UsageError):
            config.check_setting(key, value)
    config.check_setting("spacing", "compact")
    config.check_setting("co2_grams_per_kwh", "350")


@pytest.mark.parametrize("text", ["budgte = '1GiB'", "budget = 3", "budget =", b"\xff\xfe"])
def test_broken_settings_name_the_file(text: str | bytes) -> None:
    path = home().config_file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadInput, match=r"config\.toml"):
        config.stored_settings()
    with pytest.raises(UsageError):
        config.store_setting("unknown", json.dumps(1))
