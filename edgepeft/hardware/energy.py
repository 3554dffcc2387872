"""Electrical energy of the card and of the CPU package, where their counters may be read; None is what nobody tells.

RAPL counts microjoules of a whole CPU package and starts again at `max_energy_range_uj` (Linux, Documentation/power/
powercap/powercap.rst). Since Linux 5.10 only root may read it, as its fine steps betray secrets (CVE-2020-8694).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

POWERCAP = Path("/sys/class/powercap")
JOULES_PER_WATT_HOUR = 3600.0
_LEAST_SECONDS = 0.5
"""Power is a mean over at least this long: shorter than the counters' own steps it would be noise."""


class EnergyUse(msgspec.Struct, frozen=True):
    """What was used over some time."""

    card_joules: float | None = None
    package_joules: float | None = None
    """Of the CPU package, with everything else that ran on it."""
    seconds: float = 0.0
    """Of that time, measured or not."""
    partial: bool = False
    """Whether a part was measured for some of the time only, so that the figure is too low."""

    @property
    def watt_hours(self) -> float | None:
        """All that was measured; None where nothing was."""
        parts = [part for part in (self.card_joules, self.package_joules) if part is not None]
        return sum(parts) / JOULES_PER_WATT_HOUR if parts else None

    @property
    def of(self) -> str:
        """What the figure includes, in words; empty where nothing was measured."""
        parts = (("card", self.card_joules), ("CPU package", self.package_joules))
        words = " and ".join(name for name, part in parts if part is not None)
        return f"{words}, for a part of the time" if words and self.partial else words

    def with_other(self, other: EnergyUse) -> EnergyUse:
        """Both together: of two processes of one run."""
        if not self.seconds or not other.seconds:
            return other if not self.seconds else self
        pairs = ((self.card_joules, other.card_joules), (self.package_joules, other.package_joules))
        sums = [None if one is None and two is None else (one or 0.0) + (two or 0.0) for one, two in pairs]
        partial = self.partial or other.partial or any((one is None) != (two is None) for one, two in pairs)
        return EnergyUse(sums[0], sums[1], self.seconds + other.seconds, partial)


class Source(Protocol):
    """Something whose energy can be followed."""

    def advance(self) -> float | None:
        """Joules since the last call, 0 at the first; None when it does not answer."""
        ...


class CounterSource:
    """A counter of joules that only grows.

    Args:
        read: its value now.
        range_joules: where it starts again from 0; None never.
    """

    def __init__(self, read: Callable[[], float | None], range_joules: float | None = None) -> None:
        self._read = read
        self._range_joules = range_joules
        self._before: float | None = None

    def advance(self) -> float | None:
        """See `Source`; a counter that fell without having a range was reset, and counts from 0."""
        now = self._read()
        if now is None:
            return None
        before, self._before = self._before, now
        if before is None:
            return 0.0
        return (
            now - before
            if now >= before
            else now + (0.0 if self._range_joules is None else self._range_joules - before)
        )


class PowerSource:
    """Watts that are read from time to time, integrated by the trapezoidal rule."""

    def __init__(self, read: Callable[[], float | None], clock: Callable[[], float] = time.monotonic) -> None:
        self._read = read
        self._clock = clock
        self._before: tuple[float, float] | None = None

    def advance(self) -> float | None:
        """See `Source`."""
        watts, now = self._read(), self._clock()
        if watts is None:
            return None
        before, self._before = self._before, (watts, now)
        return 0.0 if before is None else (before[0] + watts) / 2 * (now - before[1])


class EnergyMeter:
    """Adds up what several sources use; `read` may be called from any thread.

    Args:
        card: of the run; None where there is none, or none that tells.
        packages: of the CPU; empty where none may be read.
        clock: seconds that never go back.
    """

    def __init__(
        self, card: Source | None, packages: Sequence[Source], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._sources: dict[str, list[Source]] = {"card": [card] if card is not None else [], "package": list(packages)}
        self._joules: dict[str, float] = {name: 0.0 for name, sources in self._sources.items() if sources}
        self._partial = False
        self._began: float | None = None
        self._marked: tuple[float, float] = (0.0, 0.0)
        self.power_watts: float | None = None
        """Mean of all sources over the last half second or more; None before that, or without a source."""
        self.latest = EnergyUse()
        """What `read` returned last."""

    def read(self) -> EnergyUse:
        """Adds what was used since the last call; returns the sum since the first."""
        with self._lock:
            now = self._clock()
            for name, sources in self._sources.items():
                for source in list(sources):
                    used = source.advance()
                    if used is None:
                        # It does not answer any more: what it told stays, and the sum says that it is too low.
                        sources.remove(source)
                        self._partial = self._began is not None
                        if self._began is None and not sources:
                            self._joules.pop(name, None)
                    else:
                        self._joules[name] += used
            total = sum(self._joules.values())
            if self._began is None:
                self._began, self._marked = now, (now, total)
            elif now - self._marked[0] >= _LEAST_SECONDS:
                alive = any(self._sources.values())
                self.power_watts = (total - self._marked[1]) / (now - self._marked[0]) if alive else None
                self._marked = (now, total)
            seconds = now - self._began
            self.latest = EnergyUse(self._joules.get("card"), self._joules.get("package"), seconds, self._partial)
            return self.latest


def find_packages(root: Path = POWERCAP) -> list[Source]:
    """The CPU packages whose energy may be read; their cores, graphics and memory are parts of them and left out."""
    found: list[Source] = []
    for zone in sorted(root.glob("intel-rapl:*")) if root.is_dir() else ():
        range_uj = _number(zone / "max_energy_range_uj")
        if zone.name.count(":") == 1 and _text(zone / "name").startswith("package") and range_uj:
            counter = zone / "energy_uj"
            if _number(counter) is not None:
                found.append(CounterSource(_microjoules(counter), range_uj / 1e6))
    return found


def card_source(sensor: Any) -> Source | None:
    """A card's counter of energy, else its power over time; None where it tells neither.

    Args:
        sensor: an `edgepeft.hardware.nvml.CardSensor`.
    """
    if sensor.energy_joules() is not None:
        return CounterSource(sensor.energy_joules)
    return PowerSource(sensor.power_watts) if sensor.power_watts() is not None else None


def _microjoules(path: Path) -> Callable[[], float | None]:
    def read() -> float | None:
        value = _number(path)
        return None if value is None else value / 1e6

    return read


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
