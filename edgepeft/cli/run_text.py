"""Runs at the terminal: plans in short, a summary at the end, tables of memory."""

from __future__ import annotations

import textwrap
from typing import get_args

from edgepeft.memory.breakdown import Category, Phase
from edgepeft.plan.train_plan import TrainPlan
from edgepeft.runs.events import Finished
from edgepeft.runs.state import HighestMemory
from edgepeft.runs.text import ending_facts, energy_text, error_text, peak_text
from edgepeft.units import format_bytes, format_seconds

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
_BAR_COLUMNS = 28
_BAR_FROM_WIDTH = 100
_EIGHTHS = " ▏▎▍▌▋▊▉"


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
    lines += [f"{label:<9}{text}" for label, text in ending_facts(ending).items()]
    lines.append(f"Memory   {peak_text(ending.measured_peak_bytes, ending.predicted_peak_bytes)}")
    if ending.energy_wh is not None:
        lines.append(f"Energy   {energy_text(ending)}")
    # An adapter in the library knows its base by itself.
    chosen = f"--adapter {ending.published.partition('@')[0]}" if ending.published else f"{model} --adapter {name}"
    lines.append(f"Next     edgepeft chat {chosen}")
    lines.append(f"{_INDENT}edgepeft eval {chosen} --data FILE")
    return lines


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
    error = error_text(measured_bytes, predicted_bytes) if predicted_bytes else "–"
    return f"  {name:<26}{_or_dash(predicted_bytes):>12}{_or_dash(measured_bytes):>12}{error:>11}"


def _or_dash(size_bytes: int) -> str:
    return format_bytes(size_bytes) if size_bytes else "–"


def _bar(share: float) -> str:
    eighths = round(8 * _BAR_COLUMNS * share)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()
