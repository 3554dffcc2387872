"""How long a run still takes, judged by the steps that it has made."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

_NEWEST = 0.2
"""Share of the newest step in the pace."""


class Pace:
    """Seconds for a unit of work, smoothed over steps.

    Args:
        work: of each step of the run, in any unit.
    """

    def __init__(self, work: Sequence[float]) -> None:
        self._work = work
        self._left = [*reversed([*accumulate(reversed(work))]), 0.0]
        self._seconds: float | None = None

    @property
    def known(self) -> bool:
        """Whether a step was made."""
        return self._seconds is not None

    def add(self, step: int, seconds: float) -> None:
        """Takes account of a step, counted from 0."""
        now = seconds / self._work[step]
        self._seconds = now if self._seconds is None else (1 - _NEWEST) * self._seconds + _NEWEST * now

    def seconds_left(self, step: int) -> float:
        """For `step` and all after it; 0 before the first step was made."""
        return (self._seconds or 0.0) * self._left[step]
