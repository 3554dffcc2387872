"""What a run does beside learning: when it evaluates, when it ends before its last step, and which state it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from edgepeft.errors import UsageError
from edgepeft.spec import MOST_SAMPLE_PROMPTS, Upkeep
from edgepeft.units import format_seconds

if TYPE_CHECKING:
    from edgepeft.plan.pins import Pins
    from edgepeft.plan.speed import RunTime
    from edgepeft.plan.train_plan import DataSummary, Origin
    from edgepeft.profiles import Preset

PATIENCE_SHARE = 4
"""Times the patience of early stopping that a run evaluates, unless it is said how often: a quarter of it then passes
without a gain before it ends."""


def decide_upkeep(pins: Pins, preset: Preset, data: DataSummary | None, steps: int) -> Upkeep:
    """The upkeep of a run.

    Early stopping is off unless it is asked for: a preset's run is short, its learning rate goes down to zero, and the
    last part of that is where the held-out loss falls once more. With it, the best state is kept.

    Args:
        pins: what was typed.
        preset: says how often a run evaluates.
        data: of the run; None plans without.
        steps: of the whole run, 0 without data.

    Raises:
        UsageError: early stopping, or keeping the best, without evaluations during the run.
    """
    early_stop = pins.get("early_stop", 0)
    keep = pins.get("keep", "best" if early_stop else "last")
    every = pins.get("eval_every")
    if every is None:
        evaluations = max(preset.evaluations.value, PATIENCE_SHARE * early_stop, 2 if keep == "best" else 0)
        evaluates = data is not None and data.eval_samples and evaluations > 1
        every = max(1, steps // evaluations) if evaluates and evaluations <= steps else 0
        if evaluates and not every and (early_stop or keep == "best"):
            every = 1
    upkeep = Upkeep(
        eval_every_steps=every,
        keep=keep,
        early_stop=early_stop,
        max_seconds=pins.get("max_time"),
        sample_prompts=pins.get("sample_prompt", ()),
    )
    if trouble := idle_upkeep(upkeep, data, steps):
        option, what, hint = trouble
        raise UsageError(what, where=f"--{option}", hint=hint)
    return upkeep


def idle_upkeep(upkeep: Upkeep, data: DataSummary | None, steps: int) -> tuple[str, str, str] | None:
    """What is asked for and could never happen: option, what is wrong, and a hint; None where all is well.

    Args:
        upkeep: of the run.
        data: of the run; None where there is none.
        steps: of the whole run.
    """
    option, needs = ("early-stop", "early stopping") if upkeep.early_stop else ("keep", "keeping the best state")
    if data is None or not (upkeep.early_stop or upkeep.keep == "best"):
        return None
    if not data.eval_samples:
        return (
            option,
            f"{needs} needs held-out samples, and there are none",
            ("Give a file with --eval-data, or a share with --eval-fraction"),
        )
    if not 0 < upkeep.eval_every_steps < steps:
        return (
            option,
            f"{needs} needs evaluations during the run, and --eval-every leaves none in {steps:,} steps",
            ("Give a smaller --eval-every, or leave it out"),
        )
    return None


def upkeep_values(upkeep: Upkeep) -> dict[str, str]:
    """Its values by option name, as people write them."""
    prompts = len(upkeep.sample_prompts)
    return {
        "eval-every": str(upkeep.eval_every_steps),
        "early-stop": str(upkeep.early_stop),
        "keep": upkeep.keep,
        "max-time": "none" if upkeep.max_seconds is None else format_seconds(upkeep.max_seconds),
        "sample-prompt": "none" if not prompts else f"{prompts} prompt{'s' if prompts > 1 else ''}",
    }


def upkeep_reasons(
    upkeep: Upkeep, pins: Pins, preset: Preset, data: DataSummary | None
) -> Iterator[tuple[str, str, Origin]]:
    """Option, reason and origin of what a plan shows of it: what acts, and what was typed."""
    if data is not None and data.eval_samples:
        if not upkeep.eval_every_steps:
            yield "eval-every", "at the end only", "preset"
        elif upkeep.early_stop or upkeep.keep == "best":
            yield "eval-every", "often enough to see where it was best", "auto"
        else:
            yield "eval-every", preset.evaluations.description, "preset"
    if "early_stop" in pins:
        yield "early-stop", "", "user"
    if upkeep.early_stop or "keep" in pins:
        yield "keep", "the state with the lowest held-out loss, as early stopping goes past it", "auto"
    if "max_time" in pins:
        yield "max-time", "", "user"
    if "sample_prompt" in pins:
        yield "sample-prompt", "", "user"


def time_note(upkeep: Upkeep, time: RunTime | None, steps: int) -> str:
    """A warning where the time that is given is predicted to be over before the steps are; else empty."""
    if time is None or upkeep.max_seconds is None or time.share >= 1:
        return ""
    return (
        f"The training time of {format_seconds(upkeep.max_seconds)} is predicted to be over after about step "
        f"{max(1, round(time.share * steps)):,} of {steps:,}: the learning rate, planned for all of them, will not "
        "have come down by then. Fewer --epochs, or --max-steps, make a shorter run of it that ends properly."
    )


def check_prompts(where: str, value: Any) -> tuple[str, ...]:
    """The sample prompts that were typed.

    Raises:
        UsageError: one is empty, or there are too many.
    """
    prompts = tuple(str(prompt) for prompt in value)
    if any(not prompt.strip() for prompt in prompts):
        raise UsageError("a prompt is empty", where=where, hint="Write what a user would ask")
    if len(prompts) > MOST_SAMPLE_PROMPTS:
        raise UsageError(
            f"{len(prompts)} prompts are too many to answer at each evaluation",
            where=where,
            hint=f"Give at most {MOST_SAMPLE_PROMPTS}",
        )
    return prompts
