"""What is shown on stderr while another process works: loading, evaluating, combining, merging."""

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


def start_inference(setup: Setup, budget_bytes: int | None = None) -> SyncInference:
    """Starts the process for a setup, with the load's progress and what it warns of on stderr.

    Args:
        setup: base, precision and device.
        budget_bytes: bound for the base, its adapters and a conversation; None for no bound.
    """
    from edgepeft.chat.client import SyncInference

    with loading_status() as progress:
        client = SyncInference.start(
            setup.entry,
            setup.precision,
            setup.compute_dtype,
            setup.device,
            budget_bytes=budget_bytes,
            progress=progress,
        )
    for warning in client.ready.warnings if client.ready else ():
        note(f"Note: {warning}.")
    return client


@contextmanager
def evaluation_progress() -> Iterator[Callable[[EvaluationProgress], None]]:
    """Done of total with the time left: in place on a terminal, a line now and then in a pipe."""
    from edgepeft.units import format_seconds

    with _told_at_times("reading the data") as tell:

        def tell_state(state: EvaluationProgress) -> None:
            left = "" if state.eta_seconds is None else f", {format_seconds(state.eta_seconds)} left"
            tell(f"{state.what}: {state.done} of {state.total}{left}", state.done == state.total)

        yield tell_state


@contextmanager
def timed_progress() -> Iterator[Callable[[str, float | None], None]]:
    """What is done, how much of it, and the time left: in place on a terminal, a line now and then in a pipe."""
    import time

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

    with _told_at_times("starting") as tell:
        yield lambda what, fraction: tell(text_of(what, fraction), False)


@contextmanager
def _told_at_times(first: str) -> Iterator[Callable[[str, bool], None]]:
    """Takes (text, whether it must be seen): in place on a terminal, a line now and then in a pipe."""
    import time

    from rich.text import Text

    if stderr.is_terminal:
        with stderr.status(Text(first, style="dim"), spinner="dots") as status:
            yield lambda text, _: status.update(Text(text, style="dim"))
        return
    told = time.monotonic()

    def tell(text: str, needed: bool) -> None:
        nonlocal told
        if needed or time.monotonic() - told >= _QUIET_SECONDS:
            told = time.monotonic()
            note(text)

    yield tell
