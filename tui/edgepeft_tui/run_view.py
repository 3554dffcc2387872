"""One run as the Train screen shows it: data alone, so that the screens need none of the rooms that read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

from edgepeft_tui.series import Curve

if TYPE_CHECKING:
    from edgepeft.runs.state import RunState

LOG_LINES = 200
SAMPLES = 20
Tone = Literal["plain", "good", "warning", "bad"]


class LogLine(msgspec.Struct, frozen=True):
    """Something that happened."""

    time: float
    """Seconds since 1970."""
    text: str
    tone: Tone = "plain"


class Sample(msgspec.Struct, frozen=True):
    """An answer given during training."""

    step: int
    prompt: str
    answer: str


class Curves(msgspec.Struct, frozen=True):
    """What can be drawn over the steps."""

    loss: Curve = Curve()
    held_out: Curve = Curve()
    rate: Curve = Curve()
    norm: Curve = Curve()
    live_bytes: Curve = Curve()
    peak_bytes: Curve = Curve()


class RunView(msgspec.Struct, frozen=True):
    """A run at one moment, with all that its screen shows."""

    id: str
    state: RunState
    model: str = ""
    adapter: str = ""
    """What a chat is started with: its published adapter, or the folder that it saved; empty while there is none."""
    predicted_bytes: int = 0
    budget_bytes: int | None = None
    curves: Curves = Curves()
    learning_rate: float | None = None
    grad_norm: float | None = None
    log: tuple[LogLine, ...] = ()
    """The newest last, at most `LOG_LINES`."""
    samples: tuple[Sample, ...] = ()
    """The newest last, at most `SAMPLES`."""
    outcome: tuple[str, ...] = ()
    """Of a run that has ended well: its memory against the prediction, its energy, why it ended early."""
    co2_grams: float | None = None
    """Estimated; None where no energy was measured."""
    co2_grams_per_kwh: float | None = None
    silent_seconds: float | None = None
    """How long a living worker has said nothing, once that is suspicious."""
    rescued: str = ""
    """Why its worker was started again without being asked, just now."""
