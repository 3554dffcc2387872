"""A plan as text: every choice with its origin and reason, memory by phase against the budget, and the runner-ups."""

from __future__ import annotations

import textwrap
from typing import Literal, get_args

from edgepeft.memory.breakdown import Breakdown, Category, Phase
from edgepeft.plan.train_plan import Choice, DataSummary, TrainPlan
from edgepeft.units import GIB, MIB, format_bytes, format_count, format_seconds, format_share

Tone = Literal["", "bold", "dim"]
Line = tuple[str, Tone]
"""A line of text and how it is set off."""

_SHADES: tuple[tuple[str, str, tuple[Category, ...]], ...] = (
    ("█", "base", ("frozen weights", "quantization constants", "embeddings and head")),
    ("▓", "adapter", ("adapter weights", "gradients", "optimizer state")),
    ("▒", "activations", ("saved activations", "recomputed layer", "logits and loss", "workspace", "KV cache")),
    ("░", "device", ("device context", "allocator slack")),
)
_INDENT = "  "


def explain(plan: TrainPlan, width: int) -> list[Line]:
    """The whole plan, for a terminal of `width` columns."""
    device = next((choice.value for choice in plan.choices if choice.what == "gpu"), plan.spec.device)
    on = "the CPU" if device == "cpu" else device
    lines: list[Line] = [(f"Plan for {plan.spec.recipe.base.model} on {on}", "bold"), ("", "")]
    lines += choice_table(plan.choices, width)
    if plan.data is not None:
        lines += [("", ""), ("Data", "bold"), *data_lines(plan, plan.data, width)]
    lines += [("", ""), ("Memory", "bold"), *memory_lines(plan.memory, plan.spec.budget_bytes, width)]
    if plan.alternatives:
        lines += [("", ""), ("Runner-ups", "bold")]
        widest = max(len(other.what) for other in plan.alternatives)
        for other in plan.alternatives:
            text = f"{_INDENT}{other.what:<{widest}}  {format_bytes(other.peak_bytes):>10}  {other.why}"
            lines.append((text, "" if other.fits else "dim"))
    if plan.notes:
        lines += [("", ""), ("Notes", "bold")]
        for note in plan.notes:
            lines += [(text, "") for text in _wrapped(note, width, first=f"{_INDENT}• ", rest=f"{_INDENT}  ")]
    return lines


def choice_table(choices: tuple[Choice, ...], width: int) -> list[Line]:
    """Columns what, value, from, why; long reasons go on below themselves."""
    what = max(len(choice.what) for choice in choices)
    value = min(max(len(choice.value) for choice in choices), 14 if width < 100 else 28)
    origin = max(len(choice.origin) for choice in choices)
    start = f"{_INDENT}{{:<{what}}}  {{:<{value}}}  {{:<{origin}}}  "
    lines: list[Line] = [((start + "{}").format("what", "value", "from", "why"), "dim")]
    blank = start.format("", "", "")
    for choice in choices:
        reasons = textwrap.wrap(choice.why, max(20, width - len(blank))) or [""]
        values = textwrap.wrap(choice.value, value) or [""]
        for index in range(max(len(reasons), len(values))):
            left = start.format(
                choice.what if index == 0 else "",
                values[index] if index < len(values) else "",
                choice.origin if index == 0 else "",
            )
            text = left + (reasons[index] if index < len(reasons) else "")
            lines.append((text.rstrip(), "bold" if choice.origin == "user" and index == 0 else ""))
    return lines


def data_lines(plan: TrainPlan, data: DataSummary, width: int) -> list[Line]:
    """Samples, tokens and steps in two or three lines."""
    share = format_share(data.trained_tokens / data.tokens) if data.tokens else "n/a"
    time = f", about {format_seconds(plan.seconds)}" if plan.seconds is not None else ""
    sentences = (
        f"{data.train_samples:,} samples to train on, {data.eval_samples:,} held out.",
        f"{format_count(data.tokens)} tokens, {share} of them carry loss. Lengths: median {data.length_p50:,}, "
        f"99 % within {data.length_p99:,}, longest {data.length_max:,}.",
        f"{plan.steps:,} steps of {plan.spec.recipe.samples_per_step} samples{time}.",
    )
    return [(text, "") for sentence in sentences for text in _wrapped(sentence, width, _INDENT, _INDENT)]


def memory_lines(memory: Breakdown, budget_bytes: int | None, width: int) -> list[Line]:
    """Categories by phase in GiB, a bar for each phase, and the peak."""
    phases = memory.phases
    unit, unit_name, digits = (GIB, "GiB", 2) if memory.peak_bytes >= GIB else (MIB, "MiB", 1)
    known = [name for name in get_args(Category) if any(phase.bytes_by_category.get(name) for phase in phases)]
    widest = max(len(name) for name in known)
    lines: list[Line] = [(f"{_INDENT}{unit_name:<{widest}}" + "".join(f"{phase.name:>12}" for phase in phases), "dim")]
    for name in known:
        cells = (phase.bytes_by_category.get(name, 0) for phase in phases)
        row = "".join(f"{size / unit:>12.{digits}f}" if size else f"{'–':>12}" for size in cells)
        lines.append((f"{_INDENT}{name:<{widest}}{row}", ""))
    totals = "".join(f"{phase.total_bytes / unit:>12.{digits}f}" for phase in phases)
    lines += [(f"{_INDENT}{'total':<{widest}}{totals}", "bold"), ("", "")]
    scale = max(budget_bytes or 0, memory.peak_bytes)
    columns = max(16, min(60, width - 26))
    for phase in phases:
        lines.append(
            (f"{_INDENT}{phase.name:<10}  {phase_bar(phase, scale, columns)}  {format_bytes(phase.total_bytes)}", "")
        )
    shown = [(shade, name) for shade, name, held in _SHADES if any(held_by in known for held_by in held)]
    lines.append((f"{_INDENT}{'':<10}  " + "   ".join(f"{shade} {name}" for shade, name in shown), "dim"))
    peak = f"Peak {format_bytes(memory.peak_bytes)} in the phase {memory.peak.name}"
    if memory.uncertainty:
        peak += f", give or take {memory.uncertainty:.0%}"
    if budget_bytes:
        share = format_share(memory.peak_bytes / budget_bytes, digits=0)
        peak += f": {share} of the budget of {format_bytes(budget_bytes)}"
    return [*lines, *((text, "bold") for text in _wrapped(peak, width, _INDENT, _INDENT))]


def phase_bar(phase: Phase, scale_bytes: int, columns: int) -> str:
    """A bar of exactly `columns` characters, in which all of them stand for `scale_bytes`."""
    bar = ""
    reached = 0
    for shade, _, held in _SHADES:
        reached += sum(phase.bytes_by_category.get(name, 0) for name in held)
        end = min(columns, round(columns * reached / scale_bytes)) if scale_bytes else 0
        bar += shade * (end - len(bar))
    return bar.ljust(columns, "·")


def _wrapped(text: str, width: int, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, max(40, width), initial_indent=first, subsequent_indent=rest)
