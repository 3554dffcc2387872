"""What runs and their events are called on screen: one sentence an event, one line a state, a summary at the end."""

from __future__ import annotations

import textwrap
from typing import get_args

from edgepeft.memory.breakdown import Category, Phase
from edgepeft.plan.train_plan import TrainPlan
from edgepeft.runs.events import (
    CheckpointSaved,
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
from edgepeft.runs.rescue import Ending
from edgepeft.runs.state import HighestMemory, RunState
from edgepeft.settings import WORLD_CO2_GRAMS_PER_KWH
from edgepeft.units import GIB, MIB, format_bytes, format_grams, format_seconds, format_watt_hours

STYLES = {
    "starting": "cyan",
    "running": "cyan",
    "finished": "green",
    "stopped": "yellow",
    "failed": "red",
    "lost": "red",
    "damaged": "red",
}
_INDENT = " " * 9
_SHOWN_CHOICES = (
    "precision",
    "rank",
    "targets",
    "max-seq-len",
    "micro-batch-tokens",
    "checkpointing",
    "epochs",
    "learning-rate",
)
_TOLD_ELSEWHERE = ("gpu", "budget", "max-steps", "samples-per-step")
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
_ENDED = {
    "early stop": "after step {0.step:,}: the held-out loss did not fall any more",
    "time": "after step {0.step:,}: the training time was over",
}
_BAR_COLUMNS = 28
_BAR_FROM_WIDTH = 100
_EIGHTHS = " ▏▎▍▌▋▊▉"


def sentence(event: Event) -> tuple[str, str] | None:
    """An event that is worth a line of its own, and its style; None for those that only move the progress line."""
    match event:
        case Evaluated():
            best = ", best so far" if event.best else ""
            return f"{_after_step(event.step)}: held-out loss {event.loss:.4f} on {event.samples:,} samples{best}", ""
        case Warned():
            return f"{_at_step(event.step)}{event.message}", "yellow"
        case OutOfMemoryHit():
            return f"Out of memory {_WHERE[event.phase].format(event)}", "yellow"
        case Recovered():
            return f"{_AGAIN[event.cause].format(event)}: {event.what}", "yellow"
        case SampleGenerated():
            answer = _one_line(event.answer, 120) or "(nothing)"
            return f"{_after_step(event.step)}: {_one_line(event.prompt, 60)} → {answer}", "dim"
        case Started() if event.step:
            return f"Resumed after step {event.step} of {event.steps} on {event.device}", ""
        case _:
            return None


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


def plan_lines(plan: TrainPlan, width: int = 100) -> list[str]:
    """A plan in short: what is trained, the choices that matter, memory against the budget, warnings.

    Args:
        plan: the plan.
        width: columns to wrap at.
    """
    recipe = plan.spec.recipe
    head = f"Plan     {recipe.base.model}, {plan.steps:,} steps of {recipe.samples_per_step} samples"
    if plan.data is not None:
        head += f", from {plan.data.train_samples:,} samples ({plan.data.tokens:,} tokens)"
    words = [
        f"{choice.what} {choice.value}" + ("" if choice.origin in ("auto", "preset") else f" ({choice.origin})")
        for choice in plan.choices
        if choice.what in _SHOWN_CHOICES or (choice.origin == "user" and choice.what not in _TOLD_ELSEWHERE)
    ]
    peak = plan.memory.peak
    memory = f"Memory   peak of {format_bytes(peak.total_bytes)} predicted ({peak.name})"
    if plan.spec.budget_bytes:
        memory += f", budget {format_bytes(plan.spec.budget_bytes)}"
    memory += ", on the CPU" if plan.spec.device == "cpu" else ""
    lines = [*wrapped(head, width), *_joined("Choices  ", words, width), *wrapped(memory, width)]
    if plan.seconds is not None:
        lines.append(f"Time     about {format_seconds(plan.seconds)}")
    for text in plan.notes:
        lines += wrapped(f"Note     {text}", width)
    return lines


def wrapped(text: str, width: int) -> list[str]:
    """`text` broken between words; later lines are indented to the column after its label."""
    return textwrap.wrap(
        text, max(width, 40), subsequent_indent=_INDENT, break_long_words=False, break_on_hyphens=False
    ) or [""]


def _joined(head: str, words: list[str], width: int) -> list[str]:
    """`words` with dots between them, broken only at the dots."""
    lines, current = [], head
    for index, word in enumerate(words):
        piece = word if index == len(words) - 1 else f"{word} · "
        if len(current.rstrip()) + len(piece.rstrip()) > max(width, 40) and current != head:
            lines.append(current.rstrip())
            current = _INDENT
        current += piece
    return [*lines, current] if words else []


def summary_lines(ending: Finished, run_path: str, model: str) -> list[str]:
    """How a run ended, its numbers, and what to type next."""
    if not ending.adapter:
        kept = f"the checkpoint of step {ending.step:,} is kept" if ending.step else "nothing was trained yet"
        return [f"Stopped while loading: {kept}"]
    name = ending.published or f"{run_path}/{ending.adapter}"
    verb = "Stopped and saved" if ending.stopped else "Trained"
    lines = [
        f"{verb} {name}: {ending.step:,} steps in {format_seconds(ending.train_seconds)}, "
        f"{ending.tokens_per_second:,.0f} tokens/s"
    ]
    losses = [
        f"{label} {loss:.4f}"
        for label, loss in (("training", ending.train_loss), ("held out", ending.eval_loss))
        if loss is not None
    ]
    if ending.eval_loss is not None and ending.base_eval_loss is not None:
        losses[-1] = f"held out {ending.base_eval_loss:.4f} (base) → {ending.eval_loss:.4f} (adapter)"
    if losses:
        lines.append("Loss     " + ", ".join(losses))
    lines += _ending_lines(ending)
    lines.append(f"Memory   {peak_text(ending.measured_peak_bytes, ending.predicted_peak_bytes)}")
    if ending.energy_wh is not None:
        lines.append(f"Energy   {energy_text(ending)}")
    # An adapter in the library knows its base by itself.
    chosen = f"--adapter {ending.published.partition('@')[0]}" if ending.published else f"{model} --adapter {name}"
    lines.append(f"Next     edgepeft chat {chosen}")
    lines.append(f"{_INDENT}edgepeft eval {chosen} --data FILE")
    return lines


def energy_text(ending: Finished) -> str:
    """What a run used, of what, and the CO₂ that stands for it; `n/a` where no sensor could be read."""
    if ending.energy_wh is None:
        return "n/a"
    text = f"{format_watt_hours(ending.energy_wh)} ({ending.energy_of}; loading is not counted)"
    if ending.co2_grams is None or ending.co2_grams_per_kwh is None:
        return text
    world = ", the world's average" if ending.co2_grams_per_kwh == WORLD_CO2_GRAMS_PER_KWH else ""
    return f"{text}, about {format_grams(ending.co2_grams)} CO₂ at {ending.co2_grams_per_kwh:g} g/kWh{world}"


def _ending_lines(ending: Finished) -> list[str]:
    """Why a run ended before its last step, and which state it kept where that is not the last one."""
    lines = []
    if ending.ended_by in _ENDED and not ending.stopped:
        lines.append(f"Ended    {_ENDED[ending.ended_by].format(ending)}")
    if ending.kept_step not in (None, ending.step):
        kept = f"Kept     the state of step {ending.kept_step:,}"
        if ending.last_eval_loss is not None:
            kept += f"; at the end the held-out loss was {ending.last_eval_loss:.4f}"
        lines.append(kept)
    return lines


def peak_text(measured_bytes: int, predicted_bytes: int) -> str:
    """Both peaks, and by how much the measured one is off the prediction."""
    text = f"peak {format_bytes(measured_bytes)} measured, {format_bytes(predicted_bytes)} predicted"
    if predicted_bytes <= 0:
        return text
    return f"{text} ({_error_text(measured_bytes, predicted_bytes)})"


def memory_table(predicted: Phase, measured: HighestMemory, width: int) -> list[str]:
    """Predicted and measured bytes by category, with the error of each; bars where the screen is wide enough.

    Args:
        predicted: the plan's ledger of its highest phase.
        measured: the run's, at its highest point.
        width: columns of the screen.
    """
    total = max(predicted.total_bytes, measured.peak_bytes, 1)
    lines = [f"{'Memory by category':<28}{'predicted':>12}{'measured':>12}{'error':>11}"]
    for category in get_args(Category):
        held = (predicted.bytes_by_category.get(category, 0), measured.by_category.get(category, 0))
        if any(held):
            bar = _bar(held[1] / total) if width >= _BAR_FROM_WIDTH else ""
            lines.append(f"{_memory_row(category, *held)}   {bar}".rstrip())
    lines.append(_memory_row("peak", predicted.total_bytes, measured.peak_bytes))
    places = [f"predicted: {predicted.name}" + (f", {predicted.place}" if predicted.place else "")]
    if measured.place:
        places.append(f"measured: {measured.place}")
    if measured.rss_bytes is not None:
        places.append(f"resident memory grew by up to {format_bytes(measured.rss_bytes)}")
    text = " · ".join(places)
    return [*lines, *textwrap.wrap(text, max(width, 40), initial_indent="  ", subsequent_indent="  ")]


def _memory_row(name: str, predicted_bytes: int, measured_bytes: int) -> str:
    error = _error_text(measured_bytes, predicted_bytes) if predicted_bytes else "–"
    return f"  {name:<26}{_or_dash(predicted_bytes):>12}{_or_dash(measured_bytes):>12}{error:>11}"


def _error_text(measured_bytes: int, predicted_bytes: int) -> str:
    # Rounded before its sign is written, or a hair's breadth below would read as -0.0.
    return f"{round(100 * (measured_bytes / predicted_bytes - 1), 1) + 0.0:+.1f} %"


def _or_dash(size_bytes: int) -> str:
    return format_bytes(size_bytes) if size_bytes else "–"


def _bar(share: float) -> str:
    eighths = round(8 * _BAR_COLUMNS * share)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()


def rescued_text(state: RunState, ending: Ending) -> str:
    """Why a run's worker was started again without being asked."""
    what = (
        "The worker was killed, probably for lack of memory"
        if ending == "killed"
        else f"The card failed ({state.message.rstrip('.')})"
    )
    since = f"its checkpoint of step {state.checkpoint_step}" if state.checkpoint_step is not None else "its beginning"
    return f"{what}. This once the run goes on by itself, from {since} with a smaller layout; Ctrl-C stops it."


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


def _after_step(step: int) -> str:
    return f"Step {step}" if step else "Base"


def _at_step(step: int | None) -> str:
    return f"Step {step}: " if step is not None else ""


def _one_line(text: str, limit: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
