"""Energy counters: RAPL in a recorded sysfs, NVML as a driver answers, and what is added up of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pynvml
import pytest

from edgepeft.cli.run_text import summary_lines
from edgepeft.errors import UsageError
from edgepeft.hardware.energy import (
    CounterSource,
    EnergyMeter,
    EnergyUse,
    PowerSource,
    card_source,
    find_packages,
)
from edgepeft.hardware.nvml import open_card
from edgepeft.runs.events import Finished, Started
from edgepeft.runs.state import RunFold, RunState
from edgepeft.runs.text import energy_text, plain_line
from edgepeft.settings import WORLD_CO2_GRAMS_PER_KWH, carbon_factor, store_setting
from edgepeft.units import format_grams, format_watt_hours
from toy_run import toy_step


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def zone(root: Path, name: str, kind: str, microjoules: int, range_uj: int = 262_143_328_850) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(kind + "\n")
    (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder


def test_packages_are_added_and_their_parts_left_out(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 7_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 1)
    zone(tmp_path, "intel-rapl:2", "psys", 1)
    clock = Clock()
    meter = EnergyMeter(None, find_packages(tmp_path), clock)
    assert meter.read().package_joules == 0.0
    assert meter.power_watts is None
    (first / "energy_uj").write_text("25000000\n")
    (second / "energy_uj").write_text("17000000\n")
    clock.now += 2.0
    use = meter.read()
    assert (use.card_joules, use.package_joules, use.seconds, use.of) == (None, 30.0, 2.0, "CPU package")
    assert meter.power_watts == 15.0
    assert use.watt_hours == pytest.approx(30 / 3600)


def test_a_counter_that_starts_again(tmp_path: Path) -> None:
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 99_000_000, range_uj=100_000_000)
    meter = EnergyMeter(None, find_packages(tmp_path))
    meter.read()
    (folder / "energy_uj").write_text("4000000\n")
    assert meter.read().package_joules == pytest.approx(5.0)


def test_what_may_not_be_read_is_none_and_never_0(tmp_path: Path) -> None:
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    (folder / "energy_uj").unlink()
    assert find_packages(tmp_path) == []
    assert find_packages(tmp_path / "none") == []
    meter = EnergyMeter(None, [])
    for _ in range(2):
        use = meter.read()
        assert (use.watt_hours, use.of, meter.power_watts) == (None, "", None)


def test_a_sensor_that_falls_silent_makes_the_sum_partial(tmp_path: Path) -> None:
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    clock = Clock()
    meter = EnergyMeter(None, find_packages(tmp_path), clock)
    meter.read()
    (folder / "energy_uj").write_text("8000000\n")
    clock.now += 1
    assert not meter.read().partial
    (folder / "energy_uj").unlink()
    clock.now += 1
    use = meter.read()
    assert (use.package_joules, use.partial, meter.power_watts) == (8.0, True, None)
    assert use.of == "CPU package, for a part of the time"


def test_processes_of_a_run_add_up() -> None:
    first, second = EnergyUse(10.0, 4.0, 60.0), EnergyUse(20.0, 1.0, 30.0)
    assert first.with_other(second) == EnergyUse(30.0, 5.0, 90.0)
    assert EnergyUse().with_other(first) == first == first.with_other(EnergyUse())
    blind = EnergyUse(None, None, 40.0)
    assert first.with_other(blind) == EnergyUse(10.0, 4.0, 100.0, partial=True)
    assert blind.with_other(first) == EnergyUse(10.0, 4.0, 100.0, partial=True)
    assert blind.with_other(blind).watt_hours is None


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """NVML's answers for one card; a test may replace one by an error."""
    answers: dict[str, Any] = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetHandleByUUID": "handle",
        "nvmlDeviceGetTotalEnergyConsumption": 5_000_000,
        "nvmlDeviceGetPowerUsage": 200_000,
    }

    def install(name: str) -> None:
        def answer(*_: Any) -> Any:
            if isinstance(answers[name], pynvml.NVMLError):
                raise answers[name]
            return answers[name]

        monkeypatch.setattr(pynvml, name, answer)

    for name in answers:
        install(name)
    return answers


def test_a_card_by_its_counter(card: dict[str, Any]) -> None:
    clock = Clock()
    with open_card("GPU-1") as sensor:
        meter = EnergyMeter(card_source(sensor), [], clock)
        meter.read()
        card["nvmlDeviceGetTotalEnergyConsumption"] += 360_000
        clock.now += 3.0
        use = meter.read()
    assert (use.card_joules, use.watt_hours, use.of) == (360.0, 0.1, "card")
    assert meter.power_watts == 120.0


def test_an_old_card_by_power_over_time(card: dict[str, Any]) -> None:
    card["nvmlDeviceGetTotalEnergyConsumption"] = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    clock = Clock()
    with open_card("GPU-1") as sensor:
        assert sensor is not None
        assert isinstance(card_source(sensor), PowerSource)
        source = PowerSource(sensor.power_watts, clock)
        assert source.advance() == 0.0
        card["nvmlDeviceGetPowerUsage"] = 100_000
        clock.now += 4.0
        assert source.advance() == 600.0


def test_a_card_that_tells_nothing(card: dict[str, Any]) -> None:
    for name in ("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage"):
        card[name] = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    with open_card("GPU-1") as sensor:
        assert card_source(sensor) is None
    card["nvmlDeviceGetHandleByUUID"] = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
    with open_card("GPU-1") as sensor:
        assert sensor is None
    card["nvmlInit"] = pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    with open_card("GPU-1") as sensor:
        assert sensor is None


def test_a_counter_that_was_reset_counts_from_0() -> None:
    values = iter([50.0, 60.0, 3.0])
    source = CounterSource(lambda: next(values))
    assert [source.advance() for _ in range(3)] == [0.0, 10.0, 3.0]


def test_the_factor_of_co2(monkeypatch: pytest.MonkeyPatch) -> None:
    assert carbon_factor() == WORLD_CO2_GRAMS_PER_KWH == 445.0
    store_setting("co2_grams_per_kwh", "350")
    assert carbon_factor() == 350.0
    monkeypatch.setenv("EDGEPEFT_CO2_GRAMS_PER_KWH", "20.5")
    assert carbon_factor() == 20.5
    for bad in ("much", "-1", "nan", "1e9"):
        monkeypatch.setenv("EDGEPEFT_CO2_GRAMS_PER_KWH", bad)
        with pytest.raises(UsageError, match="co2_grams_per_kwh"):
            carbon_factor()


def test_energy_is_shown_where_it_is_known() -> None:
    ending = Finished(
        step=4,
        adapter="adapter",
        train_seconds=60.0,
        tokens_per_second=10.0,
        predicted_peak_bytes=1,
        measured_peak_bytes=1,
    )
    assert not any("Energy" in text for text in summary_lines(ending, "/r", "m"))
    assert energy_text(ending) == "n/a"
    known = msgspec.structs.replace(
        ending, energy_wh=12.34, energy_of="card and CPU package", co2_grams=5.491, co2_grams_per_kwh=445.0
    )
    (told,) = (text for text in summary_lines(known, "/r", "m") if "Energy" in text)
    assert told == (
        "Energy   12.3 Wh (card and CPU package; loading is not counted), about 5.5 g CO₂ at 445 g/kWh, the world's "
        "average"
    )
    assert energy_text(msgspec.structs.replace(known, co2_grams_per_kwh=20.0)).endswith("at 20 g/kWh")
    folded = RunFold()
    for event in (
        Started(step=0, steps=9, device="cpu", versions={}),
        msgspec.structs.replace(toy_step(1), power_watts=81.4, energy_wh=0.5),
        msgspec.structs.replace(toy_step(2), power_watts=90.0, energy_wh=0.7),
        Started(step=1, steps=9, device="cpu", versions={}),
    ):
        folded.add(event)
    state = folded.state(True)
    assert (state.energy_wh, state.power_watts) == (0.5, None)
    step = msgspec.structs.replace(toy_step(1), power_watts=81.4)
    assert "81 W" in (plain_line(step, state, 1) or "")
    assert " W" not in (plain_line(toy_step(1), RunState("running", steps=9), 1) or "")


def test_figures_of_energy_in_words() -> None:
    assert [format_watt_hours(value) for value in (0.04123, 1.0, 999.4, 1250.0)] == [
        "0.0412 Wh",
        "1 Wh",
        "999 Wh",
        "1.25 kWh",
    ]
    assert [format_grams(value) for value in (0.0183, 5.49, 120.4, 1234.0, 445_000.0)] == [
        "0.018 g",
        "5.5 g",
        "120 g",
        "1.2 kg",
        "445 kg",
    ]
