"""How a running worker learns that it shall stop: control.json, or a signal of the system."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from edgepeft.runs.control import read_request, take_request
from edgepeft.runs.events import Event

_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK")


class StopRun(Exception):
    """Leave the step in hand, save, and end."""


class StopRequests:
    """Polled before every micro-batch.

    Args:
        folder: the run folder, whose control.json is read.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = folder
        self._signalled = False
        self.checkpoint_wanted = False
        """Set by the request `checkpoint`; whoever writes one sets it back."""

    def poll(self) -> None:
        """Looks for a request.

        Raises:
            StopRun: somebody wants the run to stop or to pause.
        """
        if read_request(self._folder) is not None:
            match take_request(self._folder):
                case "stop" | "pause":
                    self._signalled = True
                case "checkpoint":
                    self.checkpoint_wanted = True
                case None:
                    pass
        if self._signalled:
            raise StopRun

    def obeyed_by(self, emit: Callable[[Event], None]) -> Callable[[Event], None]:
        """An `emit` that looks for a request after each event: loading obeys wherever it says how far it is."""

        def emit_and_poll(event: Event) -> None:
            emit(event)
            self.poll()

        return emit_and_poll

    @contextmanager
    def catch_signals(self) -> Iterator[None]:
        """Inside the block, SIGTERM, SIGINT and SIGHUP ask to stop instead of ending the process."""

        def remember(number: int, frame: FrameType | None) -> None:
            self._signalled = True

        known = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
        before = {number: signal.signal(number, remember) for number in known}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
