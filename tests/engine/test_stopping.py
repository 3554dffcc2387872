"""Stopping while the data is read and the model is loaded: nothing is lost, and nothing is waited for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edgepeft.cli.run_text import summary_lines
from edgepeft.engine.training import loop
from edgepeft.runs.control import request
from edgepeft.runs.events import Event, Finished, PhaseChanged, StepDone
from edgepeft.runs.layout import RunFolder
from training_runs import of_type, tiny_base, tiny_run, train


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def train_stopped_in(run: RunFolder, phase: str) -> Finished:
    def stop(event: Event) -> None:
        if isinstance(event, PhaseChanged) and event.name == phase:
            request(run, "stop")

    (finished,) = of_type(train(run, stop), Finished)
    return finished


@pytest.mark.parametrize("phase", ["data", "load"])
def test_a_stop_while_loading_is_obeyed_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    base = tiny_base(tmp_path)
    whole, run = tiny_run(tmp_path, base, "whole"), tiny_run(tmp_path, base, "run")
    train(whole)
    loaded = 0
    real = loop.load_base

    def counted(*arguments: Any) -> Any:
        nonlocal loaded
        found = real(*arguments)
        loaded += 1
        return found

    monkeypatch.setattr(loop, "load_base", counted)
    finished = train_stopped_in(run, phase)
    assert (finished.stopped, finished.step, finished.adapter, loaded) == (True, 0, "", 0)
    assert summary_lines(finished, str(run.path), "tiny") == ["Stopped while loading: nothing was trained yet"]

    def stop_at_2(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 2:
            request(run, "stop")

    assert of_type(train(run, stop_at_2), Finished)[0].step == 2
    finished = train_stopped_in(run, phase)
    assert (finished.stopped, finished.step, finished.adapter) == (True, 2, "adapter")
    assert finished.train_seconds > 0
    assert of_type(train(run), Finished)[0].published == "run@v1"
    name = "adapter_model.safetensors"
    assert (run.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()
