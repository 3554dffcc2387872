"""What is shown on stderr while a base is prepared and loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgepeft.cli.output import note, stderr

if TYPE_CHECKING:
    from edgepeft.chat.client import SyncInference
    from edgepeft.chat.evaluation import EvaluationProgress
    from edgepeft.chat.setup import Setup

_QUIET_SECONDS = 10.0
"""Time between progress lines in a pipe."""
_ETA_SHARE = 0.05
"""Done share from which the time left is told."""


@contextmanager
def loading_status() -> Iterator[Callable[[str, float | None], None]]:
    """A line that changes in place on a terminal, and nothing in a pipe; takes (what, share done)."""
    from rich.text import Text

    with stderr.status(Text("starting", style="dim"), spinner="dots") as status:

        def tell(what: str, fraction: float | None) -> None:
            share = "" if fraction is None else f"  {fraction:.0%}"
            status.update(Text(f"{what}{share}", style="dim"))

        yield tell


def start_inference(setup: Setup) -> SyncInference:
    """Starts the process for a setup, with the load's progress and what it warns of on stderr."""
    from edgepeft.chat.client import SyncInference

    with loading_status() as progress:
        client = SyncInference.start(setup.entry, setup.precision, setup.compute_dtype, setup.device, progress=progress)
    for warning in client.ready.warnings if client.ready else ():
        note(f"Note: {warning}.")
    return client


@contextmanager
def evaluation_progress() -> Iterator[Callable[[EvaluationProgress], None]]:
    """Done of total with the time left: in place on a terminal, a line now and then in a pipe."""
    import time

    from rich.text import Text

    from edgepeft.units import format_seconds

    def text_of(state: EvaluationProgress) -> str:
        left = "" if state.eta_seconds is None else f", {format_seconds(state.eta_seconds)} left"
        return f"{state.what}: {state.done} of {state.total}{left}"

    if stderr.is_terminal:
        with stderr.status(Text("reading the data", style="dim"), spinner="dots") as status:
            yield lambda state: status.update(Text(text_of(state), style="dim"))
        return
    told = time.monotonic()

    def tell(state: EvaluationProgress) -> None:
        nonlocal told
        if time.monotonic() - told >= _QUIET_SECONDS or state.done == state.total:
            told = time.monotonic()
            note(text_of(state))

    yield tell


@contextmanager
def timed_progress() -> Iterator[Callable[[str, float | None], None]]:
    """What is done, how much of it, and the time left: in place on a terminal, a line now and then in a pipe."""
    import time

    from rich.text import Text

    from edgepeft.units import format_seconds

    phase, begun = "", 0.0

    def text_of(what: str, fraction: float | None) -> str:
        nonlocal phase, begun
        now = time.monotonic()
        if what != phase:
            phase, begun = what, now
        if fraction is None:
            return what
        left = (now - begun) / fraction * (1 - fraction) if fraction >= _ETA_SHARE else None
        return f"{what}: {fraction:.0%}" + ("" if left is None else f", {format_seconds(left)} left")

    if stderr.is_terminal:
        with stderr.status(Text("starting", style="dim"), spinner="dots") as status:
            yield lambda what, fraction: status.update(Text(text_of(what, fraction), style="dim"))
        return
    told = time.monotonic()

    def tell(what: str, fraction: float | None) -> None:
        nonlocal told
        text = text_of(what, fraction)
        if time.monotonic() - told >= _QUIET_SECONDS:
            told = time.monotonic()
            note(text)

    yield tell
