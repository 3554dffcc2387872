"""Spilling is told from a card that is merely slow, once, and on systems whose driver spills only."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgepeft.engine.training.spill import KNOWN_STEPS, SLOW_STEPS, SpillWatch, driver_spills
from edgepeft.units import GIB

FULL, ROOMY = (int(11.8 * GIB), 12 * GIB), (9 * GIB, 12 * GIB)
USUAL = [410.0, 395.0, 402.0, 380.0, 415.0, 400.0, 398.0, 407.0, 390.0, 404.0]
SPILLED = [61.0, 40.0, 38.0, 42.0, 39.0, 41.0, 37.0, 40.0]


def warnings(speeds: list[float], memory: tuple[int, int] | None = FULL, *, spills: bool = True) -> list[int]:
    """The steps, from 0, at which it warned."""
    watch = SpillWatch(lambda: memory, spills=spills)
    return [step for step, speed in enumerate(speeds) if watch.step(speed) is not None]


def test_a_full_card_and_slow_steps_are_told_once() -> None:
    assert warnings(USUAL + SPILLED) == [len(USUAL) + SLOW_STEPS - 1]


def test_what_it_says_to_do() -> None:
    watch = SpillWatch(lambda: FULL, spills=True)
    (told,) = [text for speed in USUAL + SPILLED if (text := watch.step(speed))]
    assert "11.8 GiB of the card's 12.0 GiB (98 %)" in told
    assert "--budget" in told
    assert "Sysmem" in told


@pytest.mark.parametrize("memory", [ROOMY, None])
def test_slow_steps_on_a_card_with_room_are_something_else(memory: tuple[int, int] | None) -> None:
    assert warnings(USUAL + SPILLED, memory) == []


def test_single_slow_steps_are_nothing() -> None:
    hiccups = [speed for usual in USUAL for speed in (usual, *[40.0] * (SLOW_STEPS - 1), usual)]
    assert warnings(USUAL + hiccups) == []


def test_a_gradual_change_is_not_a_spill() -> None:
    assert warnings([400 * 0.97**step for step in range(60)]) == []


def test_it_knows_the_usual_speed_before_it_judges() -> None:
    assert warnings(USUAL[:2] + SPILLED[: KNOWN_STEPS - 2] + SPILLED) == []


def test_nothing_happens_where_no_driver_spills() -> None:
    assert warnings(USUAL + SPILLED, spills=False) == []


def test_which_systems_spill(tmp_path: Path) -> None:
    version = tmp_path / "version"
    version.write_text("Linux version 5.15.153.1-microsoft-standard-WSL2 (root@x)")
    assert driver_spills("posix", version)
    version.write_text("Linux version 6.8.0-45-generic (buildd@x)")
    assert not driver_spills("posix", version)
    assert not driver_spills("posix", tmp_path / "none")
    assert driver_spills("nt", tmp_path / "none")
