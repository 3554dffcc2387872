"""A plan as text: every choice with its origin and reason, memory by phase against the budget, and the runner-ups."""

from __future__ import annotations

import textwrap
from typing import Literal, get_args

from edgepeft.memory.breakdown import Breakdown, Category, Phase, PhaseName
from edgepeft.memory.dry_run import DryRun
from edgepeft.plan.speed import say_time
from edgepeft.plan.train_plan import Choice, DataSummary, TrainPlan
from edgepeft.units import GIB, MIB, format_bytes, format_count, format_share

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
    if plan.wants_more:
        more = ", ".join(f"{what} from {format_bytes(size)} on" for what, size in plan.wants_more.items())
        lines += [(text, "") for text in _wrapped(f"A larger budget would bring {more}.", width, _INDENT, _INDENT)]
    if plan.dry_run is not None:
        lines += [("", ""), ("Dry run", "bold"), *dry_run_lines(plan.memory, plan.dry_run, width)]
    if plan.alternatives:
        lines += [("", ""), ("Runner-ups", "bold"), *runner_up_lines(plan, width)]
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
    time = f", {say_time(plan.seconds)}" if plan.seconds is not None else ""
    sentences = (
        f"{data.train_samples:,} samples to train on, {data.eval_samples:,} held out.",
        f"{'About ' if data.estimated else ''}{format_count(data.tokens)} tokens, {share} of them carry loss. "
        f"Lengths{' (estimated)' if data.estimated else ''}: median {data.length_p50:,}, "
        f"99 % within {data.length_p99:,}, longest {data.length_max:,}.",
        f"{plan.steps:,} steps of {plan.spec.recipe.samples_per_step} samples{time}.",
    )
    return [(text, "") for sentence in sentences for text in _wrapped(sentence, width, _INDENT, _INDENT)]


def memory_lines(memory: Breakdown, budget_bytes: int | None, width: int) -> list[Line]:
    """Categories by phase in GiB, a bar for each phase, and the peak."""
    phases = memory.phases
    unit, unit_name, digits = _unit(memory.peak_bytes)
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
    peak = _peak(memory)
    if memory.uncertainty:
        peak += f", give or take {format_share(memory.uncertainty, digits=0)}"
    if budget_bytes:
        share = format_share(memory.peak_bytes / budget_bytes, digits=0)
        peak += f": {share} of the budget of {format_bytes(budget_bytes)}"
    return [*lines, *((text, "bold") for text in _wrapped(f"{peak}.", width, _INDENT, _INDENT))]


def dry_run_lines(predicted: Breakdown, found: DryRun, width: int) -> list[Line]:
    """How it was made, the train step by category beside the prediction, and the other phases' totals."""
    layers = " and ".join(str(count) for count in found.simulated)
    extent = "all layers" if found.layers in found.simulated else f"{layers} of {found.layers} layers, the rest alike"
    kernels = "the CPU" if found.device == "cpu" else found.device
    how = (
        f"The plan's own training step on tensors without values, with the kernels of {kernels}: {extent}, in "
        f"{found.seconds:.1f} s with torch {found.torch}."
    )
    lines: list[Line] = [(text, "") for text in _wrapped(how, width, _INDENT, _INDENT)]
    if predicted.phases != found.memory.phases:
        lines += comparison_lines(predicted, found.memory)
        if predicted.correction != 1:
            learnt = f"The prediction has a correction of {100 * (predicted.correction - 1):+.1f} % beyond the base."
            lines += [("", ""), *((text, "") for text in _wrapped(learnt, width, _INDENT, _INDENT))]
    peak = f"{_peak(found.memory)}."
    return [*lines, ("", ""), *((text, "bold") for text in _wrapped(peak, width, _INDENT, _INDENT))]


def comparison_lines(predicted: Breakdown, found: Breakdown) -> list[Line]:
    """The train step by category, and every phase, as they were predicted and found."""
    step, before = _phase(found, "train step"), _phase(predicted, "train step")
    unit, unit_name, digits = _unit(max(found.peak_bytes, predicted.peak_bytes))
    known = [
        name for name in get_args(Category) if step.bytes_by_category.get(name) or before.bytes_by_category.get(name)
    ]
    pairs = [(name, before.bytes_by_category.get(name, 0), step.bytes_by_category.get(name, 0)) for name in known]
    rows = [pair for pair in pairs if round(max(pair[1:]) / unit, digits)]
    totals = [(phase.name, _phase(predicted, phase.name).total_bytes, phase.total_bytes) for phase in found.phases]
    widest = max(len(name) for name, _, _ in rows + totals)
    head = f"{_INDENT}{unit_name:<{widest}}{'predicted':>12}{'dry run':>12}{'difference':>12}"
    lines: list[Line] = [("", ""), (head, "dim")]
    for name, closed, simulated in rows:
        cells = "".join(f"{size / unit:>12.{digits}f}" if size else f"{'–':>12}" for size in (closed, simulated))
        shown = f"{(simulated - closed) / unit:+.{digits}f}"
        lines.append((f"{_INDENT}{name:<{widest}}{cells}{'–' if float(shown) == 0 else shown:>12}", ""))
    lines.append(("", ""))
    for name, closed, simulated in totals:
        cells = f"{closed / unit:>12.{digits}f}{simulated / unit:>12.{digits}f}"
        difference = f"{100 * (simulated / closed - 1):+.1f} %" if closed else "n/a"
        lines.append((f"{_INDENT}{name:<{widest}}{cells}{difference:>12}", "bold" if name == step.name else ""))
    return lines


def runner_up_lines(plan: TrainPlan, width: int) -> list[Line]:
    """What else there was: its memory, its time where that is known, and why it was not taken."""
    others = plan.alternatives
    widest = max(len(other.what) for other in others)
    times = [say_time(other.seconds).removeprefix("about ") if other.seconds is not None else "" for other in others]
    clock = max(map(len, times))
    lines: list[Line] = []
    for other, time in zip(others, times, strict=True):
        head = f"{_INDENT}{other.what:<{widest}}  {format_bytes(other.peak_bytes):>9}  "
        head += f"{time:>{clock}}  " if clock else ""
        reasons = textwrap.wrap(other.why, max(20, width - len(head))) or [""]
        tone: Tone = "" if other.fits else "dim"
        lines.append((head + reasons[0], tone))
        lines += [(" " * len(head) + reason, tone) for reason in reasons[1:]]
    return lines


def _peak(memory: Breakdown) -> str:
    place = f" ({memory.peak.place})" if memory.peak.place else ""
    return f"Peak {format_bytes(memory.peak_bytes)} in the phase {memory.peak.name}{place}"


def _phase(memory: Breakdown, name: PhaseName) -> Phase:
    return next((phase for phase in memory.phases if phase.name == name), Phase(name, {}))


def _unit(largest_bytes: int) -> tuple[int, str, int]:
    """Divisor, name and decimals that suit figures up to this."""
    if largest_bytes >= GIB:
        return GIB, "GiB", 2
    return MIB, "MiB", 1 if largest_bytes >= 100 * MIB else 2


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
    return textwrap.wrap(
        text,
        max(40, width),
        initial_indent=first,
        subsequent_indent=rest,
        break_on_hyphens=False,
        break_long_words=False,
    )
