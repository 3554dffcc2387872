"""What a run uses of electrical energy, over all of its processes, and what that means in CO₂."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from edgepeft.errors import EdgepeftError
from edgepeft.hardware.energy import EnergyMeter, EnergyUse, card_source, find_packages
from edgepeft.hardware.nvml import open_card
from edgepeft.hardware.sampler import Sampler
from edgepeft.settings import WORLD_CO2_GRAMS_PER_KWH, carbon_factor

_SAMPLE_SECONDS = 1.0
"""RAPL's counter starts again after minutes; a card's power changes within a step."""


class EnergyAccount:
    """The energy of one run: while it trains, evaluates and saves, not while it loads.

    Args:
        device: `cpu`, or the UUID of the card.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._before = EnergyUse()
        self._meter: EnergyMeter | None = None

    def go_on(self, before: EnergyUse) -> None:
        """Counts on top of what earlier processes of the run have used."""
        self._before = before

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Within it, energy is counted."""
        with open_card(self._device) if self._device != "cpu" else nullcontext() as sensor:
            self._meter = EnergyMeter(card_source(sensor) if sensor is not None else None, find_packages())
            self._meter.read()
            with Sampler(self._meter.read, _SAMPLE_SECONDS):
                yield

    @property
    def power_watts(self) -> float | None:
        """Of the moment; None where nothing tells."""
        return None if self._meter is None else self._meter.power_watts

    @property
    def watt_hours(self) -> float | None:
        """Of the run until a moment ago; no sensor is asked."""
        return (
            self._before.watt_hours if self._meter is None else self._before.with_other(self._meter.latest).watt_hours
        )

    def use(self) -> EnergyUse:
        """Of the run until now."""
        return self._before if self._meter is None else self._before.with_other(self._meter.read())

    def ending(self, warn: Callable[[str], None]) -> dict[str, Any]:
        """What a `Finished` event says of energy; empty where nothing was measured.

        Args:
            warn: told when the factor that is set cannot be used.
        """
        use = self.use()
        if use.watt_hours is None:
            return {}
        try:
            factor = carbon_factor()
        except EdgepeftError as error:
            # Hours of work do not fail on a figure beside them.
            warn(f"CO₂ is estimated with the world's average: {error}")
            factor = WORLD_CO2_GRAMS_PER_KWH
        return {
            "energy_wh": use.watt_hours,
            "energy_of": use.of,
            "co2_grams": use.watt_hours / 1000 * factor,
            "co2_grams_per_kwh": factor,
        }
