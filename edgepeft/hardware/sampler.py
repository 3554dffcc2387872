"""A thread that measures at an interval and keeps only the latest value, so that a screen never waits for a sensor."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

from edgepeft.errors import EdgepeftError

Value = TypeVar("Value")


class Sampler(Generic[Value]):
    """Calls `read` every `interval_seconds` in a daemon thread; `latest` never blocks.

    Args:
        read: takes one sample.
        interval_seconds: time between the starts of two samples.
        expected: errors of `read` that end the thread quietly and are raised by the next look at `latest`.
    """

    def __init__(
        self,
        read: Callable[[], Value],
        interval_seconds: float = 1.0,
        expected: tuple[type[Exception], ...] = (OSError, EdgepeftError),
    ) -> None:
        self._read = read
        self._interval_seconds = interval_seconds
        self._expected = expected
        self._sample: tuple[Value, float] | None = None
        self._failure: Exception | None = None
        self._stopping = threading.Event()
        self._first = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="edgepeft-sampler", daemon=True)

    @property
    def latest(self) -> Value | None:
        """The newest sample; None before the first."""
        if self._failure is not None:
            raise self._failure
        return None if self._sample is None else self._sample[0]

    @property
    def age_seconds(self) -> float | None:
        """How old the newest sample is; None before the first."""
        return None if self._sample is None else time.monotonic() - self._sample[1]

    def wait(self, timeout_seconds: float) -> Value | None:
        """Waits for the first sample, at most that long, and returns the newest."""
        self._first.wait(timeout_seconds)
        return self.latest

    def start(self) -> Sampler[Value]:
        """Starts sampling."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends the thread after the sample that it is taking."""
        self._stopping.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=5)

    def __enter__(self) -> Sampler[Value]:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _loop(self) -> None:
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                value = self._read()
            except self._expected as error:
                self._failure = error
                self._first.set()
                return
            self._sample = (value, time.monotonic())
            self._first.set()
            self._stopping.wait(max(0.0, self._interval_seconds - (time.monotonic() - began)))
