"""What runs and their events are called, on every screen: one sentence an event, one phrase a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgepeft.runs.events import (
    Cause,
    CheckpointSaved,
    EndedBy,
    Evaluated,
    Event,
    Finished,
    OutOfMemoryHit,
    PhaseChanged,
    Recovered,
    SampleGenerated,
    Started,
    StepDone,
    Warned,
)
from edgepeft.runs.state import RunState
from edgepeft.settings import WORLD_CO2_GRAMS_PER_KWH
from edgepeft.units import GIB, MIB, format_bytes, format_grams, format_seconds, format_watt_hours

if TYPE_CHECKING:
    from edgepeft.runs.rescue import Ending

PHASES = {
    "load": "Loading the model",
    "data": "Reading the data",
    "train": "Training",
    "evaluate": "Evaluating",
    "save": "Saving",
}
_WHERE = {
    "probe": "while the largest micro-batch of {0.micro_batch_tokens:,} tokens was tried, before step {0.step}",
    "evaluation": "in an evaluation after step {0.step} (micro-batch of {0.micro_batch_tokens:,} tokens)",
} | dict.fromkeys(
    ("load", "train step", "save"), "in step {0.step} ({0.phase}, micro-batch of {0.micro_batch_tokens:,} tokens)"
)
_AGAIN = {
    "step": "Step {0.step} is done again with a smaller layout, nothing lost",
    "probe": "The layout becomes smaller, what is learned stays the same",
    "evaluation": "The evaluation goes on in smaller pieces, training as before",
    "killed": "The worker before this one was killed, so step {0.step} begins with a smaller layout, nothing lost",
    "device": "The card failed, so step {0.step} begins with a smaller layout, nothing lost",
}
_OUTCOME: dict[Cause, str] = {
    "step": "step redone, nothing lost",
    "probe": "what is learned stays the same",
    "evaluation": "training as before",
    "killed": "step redone, nothing lost",
    "device": "step redone, nothing lost",
}
_ENDED: dict[EndedBy, str] = {
    "early stop": "after step {0.step:,}: the held-out loss did not fall any more",
    "time": "after step {0.step:,}: the training time was over",
}


def sentence(event: Event) -> tuple[str, str] | None:
    """An event that is worth a line of its own, and its style; None for those that only move the progress line."""
    match event:
        case Evaluated():
            best = ", best so far" if event.best else ""
            return f"{after_step(event.step)}: held-out loss {event.loss:.4f} on {event.samples:,} samples{best}", ""
        case Warned():
            return f"{_at_step(event.step)}{event.message}", "yellow"
        case OutOfMemoryHit():
            return f"Out of memory {_WHERE[event.phase].format(event)}", "yellow"
        case Recovered():
            return f"{_AGAIN[event.cause].format(event)}: {event.what}", "yellow"
        case SampleGenerated():
            answer = one_line(event.answer, 120) or "(nothing)"
            return f"{after_step(event.step)}: {one_line(event.prompt, 60)} → {answer}", "dim"
        case Started() if event.step:
            return f"Resumed after step {event.step} of {event.steps} on {event.device}", ""
        case _:
            return None


def recovery_sentence(hit: OutOfMemoryHit, recovered: Recovered) -> str:
    """Running out of memory and what became of it, told together once both are known."""
    before, after = hit.micro_batch_tokens, recovered.micro_batch_tokens
    smaller = f"micro-batch {before:,} → {after:,} tokens" if after < before else recovered.what
    place = {"probe": f"in the trial before step {hit.step}", "evaluation": f"in an evaluation after step {hit.step}"}
    where = place.get(hit.phase, f"in step {hit.step}")
    return f"Out of memory {where}; {smaller}, {_OUTCOME[recovered.cause]}"


def plain_line(event: Event, state: RunState, predicted_peak_bytes: int) -> str | None:
    """What an event is worth where no line can be redrawn; None when nothing."""
    match event:
        case PhaseChanged(fraction=None) | PhaseChanged(fraction=0.0):
            return PHASES[event.name] + (f": {event.detail}" if event.detail else "")
        case CheckpointSaved():
            return f"Step {event.step}: checkpoint saved"
        case StepDone():
            power = "" if event.power_watts is None else f", {event.power_watts:.0f} W"
            eta = "" if event.eta_seconds is None else f", ETA {format_seconds(event.eta_seconds)}"
            return (
                f"Step {event.step}/{state.steps}: loss {event.loss:.4f}, {event.tokens_per_second:,.0f} tokens/s, "
                f"{memory_text(state, predicted_peak_bytes)}{power}{eta}"
            )
        case _:
            return None


def memory_text(state: RunState, predicted_peak_bytes: int) -> str:
    """`0.92 GiB, peak 1.02 of 1.05 planned`: live now, highest so far, and what the plan said."""
    if state.live_bytes is None or state.peak_bytes is None:
        return f"memory n/a of {format_bytes(predicted_peak_bytes)} planned"
    # One unit for all three; a toy model would be 0.00 GiB throughout.
    size, unit = (GIB, "GiB") if predicted_peak_bytes >= 100 * MIB else (MIB, "MiB")
    live, peak, predicted = (count / size for count in (state.live_bytes, state.peak_bytes, predicted_peak_bytes))
    return f"{live:.2f} {unit}, peak {peak:.2f} of {predicted:.2f} planned"


def energy_text(ending: Finished) -> str:
    """What a run used, of what, and the CO₂ that stands for it; `n/a` where no sensor could be read."""
    if ending.energy_wh is None:
        return "n/a"
    text = f"{format_watt_hours(ending.energy_wh)} ({ending.energy_of}; loading is not counted)"
    if ending.co2_grams is None or ending.co2_grams_per_kwh is None:
        return text
    world = ", the world's average" if ending.co2_grams_per_kwh == WORLD_CO2_GRAMS_PER_KWH else ""
    return f"{text}, about {format_grams(ending.co2_grams)} CO₂ at {ending.co2_grams_per_kwh:g} g/kWh{world}"


def ending_facts(ending: Finished) -> dict[str, str]:
    """Why a run ended before its last step, and which state it kept where that is not the last one: label → words."""
    facts = {}
    if ending.ended_by in _ENDED and not ending.stopped:
        facts["Ended"] = _ENDED[ending.ended_by].format(ending)
    if ending.kept_step not in (None, ending.step):
        kept = f"the state of step {ending.kept_step:,}"
        if ending.last_eval_loss is not None:
            kept += f"; at the end the held-out loss was {ending.last_eval_loss:.4f}"
        facts["Kept"] = kept
    return facts


def peak_text(measured_bytes: int, predicted_bytes: int) -> str:
    """Both peaks, and by how much the measured one is off the prediction."""
    text = f"peak {format_bytes(measured_bytes)} measured, {format_bytes(predicted_bytes)} predicted"
    if predicted_bytes <= 0:
        return text
    return f"{text} ({error_text(measured_bytes, predicted_bytes)})"


def error_text(measured_bytes: int, predicted_bytes: int) -> str:
    """By how much the measured bytes are off the predicted ones, in percent with a sign."""
    # Rounded before its sign is written, or a hair's breadth below would read as -0.0.
    return f"{round(100 * (measured_bytes / predicted_bytes - 1), 1) + 0.0:+.1f} %"


def rescued_text(state: RunState, ending: Ending, stop_with: str = "Ctrl-C") -> str:
    """Why a run's worker was started again without being asked.

    Args:
        state: of the run when its worker had ended.
        ending: how it had.
        stop_with: the key that stops the run.
    """
    what = (
        "The worker was killed, probably for lack of memory"
        if ending == "killed"
        else f"The card failed ({state.message.rstrip('.')})"
    )
    since = f"its checkpoint of step {state.checkpoint_step}" if state.checkpoint_step is not None else "its beginning"
    return f"{what}. This once the run goes on by itself, from {since} with a smaller layout; {stop_with} stops it."


def lost_text(run_id: str, state: RunState, *, again: bool) -> str:
    """What to do about a run whose worker ended without a word.

    Args:
        run_id: of the run.
        state: of it.
        again: whether it had been started again before without being asked.
    """
    told = f"run {run_id} is lost at step {state.step} of {state.steps}: its worker was killed"
    if again:
        told += " once more, in a smaller layout; close other programs, or train with a smaller --budget"
    return f"{told}. Resume it with `edgepeft runs resume {run_id}`."


def progress_text(state: RunState) -> str:
    """`412/900`, or a dash before anything is known."""
    return f"{state.step}/{state.steps}" if state.steps else "–"


def after_step(step: int) -> str:
    """What an evaluation or a sample is of."""
    return f"Step {step}" if step else "Base"


def _at_step(step: int | None) -> str:
    return f"Step {step}: " if step is not None else ""


def one_line(text: str, limit: int) -> str:
    """`text` without its line ends, cut at `limit` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
