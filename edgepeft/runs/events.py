"""What a training process says, one JSON object a line in `events.jsonl`.

The first line is `Started`, with the schema version. Readers skip types they do not know.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from edgepeft.memory.breakdown import Category

SCHEMA = 1

Cause = Literal["step", "probe", "evaluation", "killed", "device"]
"""Why a run went on in a smaller layout: memory ran out in a step, in the trial before the first step or in an
evaluation, or the worker before this one was killed or lost its card."""


EndedBy = Literal["steps", "early stop", "time", "request"]
"""Why a run ended: all steps are done, the held-out loss did not improve any more, the time is over, or somebody
stopped it."""


class _Event(msgspec.Struct, frozen=True, tag_field="type", omit_defaults=True, kw_only=True):
    time: float = 0.0
    """Seconds since 1970, set when it is written."""


class Started(_Event, frozen=True, kw_only=True, tag="started", omit_defaults=False):
    """A worker took the run; later steps than `step` seen before are void."""

    schema: int = SCHEMA
    step: int = 0
    """Optimizer steps already done."""
    steps: int
    """Steps of the whole run."""
    device: str
    """Name of the device."""
    versions: dict[str, str]
    """Package → version."""
    rss_bytes: int | None = None
    """Anonymous and shared resident bytes of the process after its imports, before anything is loaded."""


class PhaseChanged(_Event, frozen=True, kw_only=True, tag="phase"):
    """What the worker does now."""

    name: Literal["load", "data", "train", "evaluate", "save"]
    detail: str = ""
    fraction: float | None = None
    """Done share of the phase, where it is known."""


class StepDone(_Event, frozen=True, kw_only=True, tag="step"):
    """One optimizer step."""

    step: int
    """Counted from 1."""
    loss: float
    """Mean over the step's trained tokens, natural logarithm."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Tokens that went through the model in this step."""
    trained_tokens: int
    seconds: float
    tokens_per_second: float
    """`tokens` / `seconds`."""
    live_bytes: int | None = None
    """Live tensor bytes, base included, after the step."""
    peak_bytes: int | None = None
    """Highest measured so far in this process; see `MemoryMeasured.peak_bytes`."""
    rss_bytes: int | None = None
    """Anonymous and shared resident bytes of the process after the step."""
    eta_seconds: float | None = None
    power_watts: float | None = None
    """Of what `Finished.energy_of` names, the mean of about the last second; None where no sensor may be read."""
    energy_wh: float | None = None
    """Since the run began, all processes together."""


class Evaluated(_Event, frozen=True, kw_only=True, tag="eval"):
    """Loss on held-out samples."""

    step: int
    """0 is the base alone, before the first step."""
    loss: float
    samples: int
    trained_tokens: int
    best: bool = False
    """Whether no step before had a lower one; never said of the base."""


class SampleGenerated(_Event, frozen=True, kw_only=True, tag="sample"):
    """An answer given during training."""

    step: int
    """0 is the base alone, before the first step."""
    prompt: str
    answer: str


class MemoryMeasured(_Event, frozen=True, kw_only=True, tag="memory"):
    """A new measured peak."""

    step: int
    phase: Literal["load", "train step", "evaluation", "save"]
    live_bytes: int
    """Live tensor bytes now, base included."""
    peak_bytes: int
    """Highest so far in this process: on the CPU live tensor bytes, on a card all that the process held of it."""
    reserved_bytes: int | None = None
    """What the CUDA allocator held at most; None on the CPU."""
    rss_bytes: int | None = None
    """Anonymous and shared resident bytes of the process now."""
    by_category: dict[Category, int] = {}
    """What `peak_bytes` is made of; adds up to it."""
    place: str = ""
    """Where the peak was, such as `backward of layer 3`."""


class CheckpointSaved(_Event, frozen=True, kw_only=True, tag="checkpoint"):
    """The run can be resumed from here."""

    step: int
    path: str
    """Relative to the run folder."""


class Warned(_Event, frozen=True, kw_only=True, tag="warning"):
    """Something a person should know."""

    message: str
    step: int | None = None


class OutOfMemoryHit(_Event, frozen=True, kw_only=True, tag="oom"):
    """Memory ran out inside a step, an evaluation, or the trial of the largest micro-batch before the first step."""

    step: int
    phase: Literal["load", "train step", "evaluation", "save", "probe"]
    micro_batch_tokens: int
    message: str = ""


class Recovered(_Event, frozen=True, kw_only=True, tag="recovered"):
    """The same work goes on with a smaller layout; what is learned does not change."""

    step: int
    what: str
    """What changed, in words."""
    micro_batch_tokens: int
    checkpointing: str
    cause: Cause = "step"


class Finished(_Event, frozen=True, kw_only=True, tag="finished"):
    """The adapter is written."""

    step: int
    adapter: str
    """Path of the adapter, relative to the run folder; empty when it was stopped before there was one."""
    stopped: bool = False
    """True when the user stopped it before the last step."""
    train_seconds: float
    """Time spent in training steps, all processes of the run together."""
    tokens_per_second: float
    predicted_peak_bytes: int
    measured_peak_bytes: int
    """On the CPU live tensor bytes, on a card all that the process held of it; over all workers of the run."""
    measured_by_category: dict[Category, int] = {}
    """What that is made of; adds up to it."""
    measured_place: str = ""
    """Where it was."""
    live_peak_bytes: int | None = None
    """Live tensor bytes at their highest; on the CPU the measured peak itself."""
    reserved_peak_bytes: int | None = None
    """What the CUDA allocator held at most; None on the CPU."""
    rss_peak_bytes: int | None = None
    """Anonymous and shared resident bytes at their highest, less those before anything was loaded."""
    train_loss: float | None = None
    eval_loss: float | None = None
    """Of the state that is kept."""
    last_eval_loss: float | None = None
    """Of the state after the last step."""
    base_eval_loss: float | None = None
    """Of the base alone, on the same samples."""
    kept_step: int | None = None
    """The step whose state became the adapter; None in runs of before this was told, where it was `step`."""
    ended_by: EndedBy = "steps"
    published: str = ""
    """`NAME@vK` in the adapter library; empty when nothing was published."""
    energy_wh: float | None = None
    """Used while training, evaluating and saving, all processes of the run together; None where no sensor may be
    read."""
    energy_of: str = ""
    """What that includes, in words, such as `card and CPU package`."""
    co2_grams: float | None = None
    """Estimated from it."""
    co2_grams_per_kwh: float | None = None
    """With this factor."""


class Failed(_Event, frozen=True, kw_only=True, tag="failed"):
    """The run ended without an adapter; it may be resumed from its last checkpoint."""

    message: str
    """One line for a person."""
    exit_code: int
    step: int = 0
    traceback: str = ""
    """For bugs of ours only."""


Event = (
    Started
    | PhaseChanged
    | StepDone
    | Evaluated
    | SampleGenerated
    | MemoryMeasured
    | CheckpointSaved
    | Warned
    | OutOfMemoryHit
    | Recovered
    | Finished
    | Failed
)
