"""Time of steps and growth of resident memory, measured alike in every engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

SAMPLE_SECONDS = 0.01


class Meter:
    """Begins when an engine's libraries are imported and nothing is loaded.

    Args:
        resident: reads anonymous and shared resident bytes of this process.
    """

    def __init__(self, resident: Callable[[], int | None]) -> None:
        self._resident = resident
        self._before = self.peak_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._at = 0.0
        self.seconds: list[float] = []
        """Of each step."""
        self.losses: list[float] = []

    def begin(self) -> None:
        """The libraries are there."""
        self._before = self.peak_bytes = self._resident() or 0
        self._thread.start()

    def ready(self) -> None:
        """The first step begins."""
        self._at = time.perf_counter()

    def step(self, loss: float) -> None:
        """A step is done, its mean loss known."""
        now = time.perf_counter()
        self.seconds.append(now - self._at)
        self.losses.append(loss)
        self._at = now

    def end(self) -> None:
        """Nothing after it is counted."""
        self._ended.set()
        self._thread.join()

    @property
    def growth_bytes(self) -> int:
        """Resident bytes at their highest, less those before loading."""
        return self.peak_bytes - self._before

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, self._resident() or 0)
