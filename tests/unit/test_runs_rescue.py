"""When a run whose worker ended is worth a second start, and that it gets no more than one."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from edgepeft.errors import ExitCode
from edgepeft.runs import rescue as rescue_module
from edgepeft.runs.control import request
from edgepeft.runs.layout import RunFolder, create_run
from edgepeft.runs.rescue import claim, ending_of, rescue
from edgepeft.runs.state import RunState
from toy_run import toy_plan

LOST = RunState(status="lost", step=3, steps=9, phase="train")
CARD = RunState(status="failed", step=3, steps=9, phase="train", exit_code=ExitCode.DEVICE)


@pytest.fixture
def run() -> RunFolder:
    return create_run(toy_plan(), "r")


def ended(monkeypatch: pytest.MonkeyPatch, code: int | None) -> None:
    monkeypatch.setattr(rescue_module, "exit_code_of", lambda run: code)


@pytest.mark.parametrize(
    ("code", "ending"), [(-9, "killed"), (137, "killed"), (None, "killed"), (-11, None), (1, None)]
)
def test_only_a_kill_is_taken_for_one(
    monkeypatch: pytest.MonkeyPatch, run: RunFolder, code: int | None, ending: str | None
) -> None:
    ended(monkeypatch, code)
    assert ending_of(run, LOST) == ending


@pytest.mark.parametrize("phase", ["", "load", "data"])
def test_before_the_first_trial_a_smaller_layout_would_not_help(
    monkeypatch: pytest.MonkeyPatch, run: RunFolder, phase: str
) -> None:
    ended(monkeypatch, -9)
    assert ending_of(run, msgspec.structs.replace(LOST, phase=phase)) is None
    assert ending_of(run, msgspec.structs.replace(CARD, phase=phase)) is None


@pytest.mark.parametrize("asked", ["stop", "pause"])
def test_a_run_that_is_to_stop_stays_stopped(monkeypatch: pytest.MonkeyPatch, run: RunFolder, asked: Any) -> None:
    ended(monkeypatch, -9)
    request(run, asked)
    assert ending_of(run, LOST) is None


def test_a_card_that_failed_is_another_reason_and_other_failures_are_none(run: RunFolder) -> None:
    assert ending_of(run, CARD) == "device"
    for code in set(ExitCode) - {ExitCode.DEVICE}:
        assert ending_of(run, msgspec.structs.replace(CARD, exit_code=code)) is None
    for status in ("finished", "stopped", "running", "starting", "damaged"):
        assert ending_of(run, RunState(status=status, phase="train")) is None  # type: ignore[arg-type]


def test_one_rescue_and_no_more(monkeypatch: pytest.MonkeyPatch, run: RunFolder) -> None:
    started: list[str] = []
    monkeypatch.setattr(rescue_module, "restart_smaller", lambda run, ending: started.append(ending))
    assert rescue(run, "killed")
    assert not rescue(run, "killed")
    assert not rescue(run, "device")
    assert not claim(run)
    assert started == ["killed"]
