"""A run counts its energy over all of its processes, and says nothing where no sensor may be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgepeft.engine.training import energy
from edgepeft.engine.training.checkpoints import read_newest_checkpoint
from edgepeft.hardware.energy import CounterSource
from edgepeft.library.store import resolve_adapter
from edgepeft.runs.control import request
from edgepeft.runs.events import Finished, StepDone, Warned
from training_runs import of_type, tiny_base, tiny_run, train


class Ticking:
    """A package that uses a joule between any two looks at it."""

    joules = 0.0

    def __call__(self) -> float:
        self.joules += 1.0
        return self.joules


def test_a_stopped_and_resumed_run_adds_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "find_packages", lambda: [CounterSource(Ticking())])
    monkeypatch.setenv("EDGEPEFT_CO2_GRAMS_PER_KWH", "100")
    run = tiny_run(tmp_path, tiny_base(tmp_path), checkpoint_steps=1)

    def stop(event: Any) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            request(run, "stop")

    (first,) = of_type(train(run, stop), Finished)
    checkpoint = read_newest_checkpoint(run.checkpoints, run.read_plan().spec.recipe, pytest.fail)
    assert checkpoint is not None
    kept = checkpoint.position.energy
    assert kept.package_joules is not None
    assert kept.card_joules is None
    events = train(run)
    steps = of_type(events, StepDone)
    assert all(step.energy_wh is not None and step.energy_wh >= kept.package_joules / 3600 for step in steps)
    (finished,) = of_type(events, Finished)
    assert first.energy_wh is not None
    assert finished.energy_wh is not None
    assert finished.energy_wh > kept.package_joules / 3600
    assert finished.energy_of == "CPU package"
    assert finished.co2_grams == pytest.approx(finished.energy_wh * 0.1)
    assert finished.co2_grams_per_kwh == 100.0
    card = resolve_adapter("tiny").card
    assert card is not None
    assert card.metrics["energy_wh"] == finished.energy_wh


def test_without_a_sensor_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "find_packages", list)
    events = train(tiny_run(tmp_path, tiny_base(tmp_path), max_steps=2))
    assert {(step.power_watts, step.energy_wh) for step in of_type(events, StepDone)} == {(None, None)}
    (finished,) = of_type(events, Finished)
    assert (finished.energy_wh, finished.co2_grams, finished.energy_of) == (None, None, "")


def test_a_bad_factor_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "find_packages", lambda: [CounterSource(Ticking())])
    monkeypatch.setenv("EDGEPEFT_CO2_GRAMS_PER_KWH", "much")
    events = train(tiny_run(tmp_path, tiny_base(tmp_path), max_steps=1))
    assert any("world's average" in warning.message for warning in of_type(events, Warned))
    assert of_type(events, Finished)[0].co2_grams_per_kwh == 445.0
