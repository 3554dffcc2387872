"""The demo's data: deterministic, balanced, and fair to score on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from edgepeft.demo.alerts import HELD_OUT_ALERTS, TRAIN_ALERTS, generate, write_data
from edgepeft.demo.impacts import IMPACTS
from edgepeft.demo.wordings import FRAMES, SYSTEMS, System


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_each_system_has_varied_causes(system: System) -> None:
    assert len(system.causes) >= 6
    assert len({cause.step for cause in system.causes}) == len(system.causes)
    wordings = [wording for cause in system.causes for wording in cause.wordings]
    assert len(wordings) == len(set(wordings))
    assert all(len(cause.wordings) >= 12 for cause in system.causes)


@pytest.mark.parametrize("seed", [0, 1, 17])
@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_held_out_wordings_do_not_occur_in_training(system: System, seed: int) -> None:
    alerts = generate(system, seed)
    assert (len(alerts.train), len(alerts.held_out)) == (TRAIN_ALERTS, HELD_OUT_ALERTS)
    wordings = [_fixed_words(wording) for cause in system.causes for wording in cause.wordings]
    impacts = [impact for sentences in IMPACTS.values() for impact in sentences]
    for used in (wordings, [(impact,) for impact in impacts]):
        in_train = {parts for parts in used if any(_says(alert.text, parts) for alert in alerts.train)}
        in_held_out = {parts for parts in used if any(_says(alert.text, parts) for alert in alerts.held_out)}
        assert in_train
        assert in_held_out
        assert not in_train & in_held_out


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_alerts_are_balanced_and_their_components_are_named_in_them(system: System) -> None:
    alerts = generate(system, 3)
    for part in (alerts.train, alerts.held_out):
        for field in ("cause", "severity"):
            counts = Counter(alert.diagnosis[field] for alert in part)
            assert max(counts.values()) == min(counts.values())
        assert all(alert.diagnosis["component"] in alert.text for alert in part)
        assert len({alert.text for alert in part}) > 0.95 * len(part)
    assert all("{" not in alert.text for alert in alerts.train + alerts.held_out)


def test_the_same_seed_writes_the_same_files(tmp_path: Path) -> None:
    first = write_data(tmp_path / "a", 5)
    second = write_data(tmp_path / "b", 5)
    other = write_data(tmp_path / "c", 6)
    assert set(first) == {"database", "directory", "network"}
    for name, (train, held_out) in first.items():
        assert train.read_bytes() == second[name][0].read_bytes()
        assert held_out.read_bytes() == second[name][1].read_bytes()
        assert train.read_bytes() != other[name][0].read_bytes()
        record = json.loads(train.read_text().splitlines()[0])
        assert [message["role"] for message in record["messages"]] == ["user", "assistant"]
        assert set(json.loads(record["messages"][1]["content"])) == {"severity", "cause", "component", "runbook_step"}


def _fixed_words(wording: str) -> tuple[str, ...]:
    pieces = "".join(char if char != "{" else "\0" for char in wording).split("\0")
    return tuple(piece.split("}")[-1].strip() for piece in pieces if piece.split("}")[-1].strip(" ,."))


def _says(text: str, parts: tuple[str, ...]) -> bool:
    position = 0
    lowered = text.lower()
    for part in parts:
        found = lowered.find(part.lower(), position)
        if found < 0:
            return False
        position = found + len(part)
    return True


def test_frames_name_every_part() -> None:
    for frame in FRAMES:
        assert all(part in frame for part in ("{component}", "{symptom}", "{impact}"))
