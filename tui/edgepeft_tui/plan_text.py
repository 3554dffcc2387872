"""What the Plan screen says in words: pure functions from a plan to text."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from edgepeft.memory.breakdown import Breakdown
from edgepeft.units import format_bytes, format_count, format_share
from edgepeft_tui.glyphs import ASCII, glyphs
from edgepeft_tui.text import visible
from edgepeft_tui.widgets.ledger_bar import format_in, unit_of

if TYPE_CHECKING:
    from edgepeft.plan.train_plan import TrainPlan
    from edgepeft_tui.plans import Glance, PlanView, Question, Refusal

_PHASES = {"train step": "train step", "evaluation": "eval", "save": "save"}


def now() -> float:
    """Seconds since the epoch; tests stop it."""
    return time.time()


def memory_title(memory: Breakdown) -> str:
    """The frame's title: which phase is the peak."""
    return f"Memory at the peak {glyphs().dot} {memory.peak.name}"


def spare_text(peak_bytes: int, unsure_bytes: int, budget_bytes: int | None) -> Text:
    """Predicted, with what it may be off, and what is left of the budget."""
    unit, name = unit_of(max(peak_bytes, budget_bytes or 0))
    sign = "+-" if glyphs() is ASCII else "±"
    text = Text()
    text.append(f"predicted {format_in(peak_bytes, unit)} {name}", style="bold")
    if unsure_bytes:
        text.append(f" {sign} {format_in(unsure_bytes, unit)}")
    if budget_bytes is not None:
        left = budget_bytes - peak_bytes
        if left < 0:
            text.append(f" {glyphs().dot} does not fit by {format_in(-left, unit)}", style="bold red")
        elif left < unsure_bytes:
            text.append(f" {glyphs().dot} fits barely: {format_in(left, unit)} to spare", style="yellow")
        else:
            text.append(f" {glyphs().dot} fits with {format_in(left, unit)} to spare", style="green")
    return text


def summary_text(view: PlanView, wide: bool) -> Text:
    """Peak and budget, the other phases, steps and time."""
    plan, memory, dot = view.plan, view.memory, f" {glyphs().dot} "
    unsure = round(memory.peak_bytes * memory.uncertainty)
    first = spare_text(memory.peak_bytes, unsure, plan.spec.budget_bytes)
    unit, _ = unit_of(max(memory.peak_bytes, plan.spec.budget_bytes or 0))
    phases = "  ".join(
        f"{_PHASES.get(phase.name, phase.name)} {format_in(phase.total_bytes, unit)}"
        for phase in memory.phases
        if phase.name != memory.peak.name
    )
    if plan.dry_run is not None:
        found = plan.dry_run.memory.peak_bytes
        off = 100 * (found / memory.peak_bytes - 1) if memory.peak_bytes else 0.0
        first.append(f"{dot}dry run {format_in(found, unit)} ({off:+.1f} %)", style="bold")
    second = Text(phases, style="dim")
    when = time_text(plan)
    if wide:
        first.append(f"{dot}{phases}", style="dim")
        second = Text()
    if when:
        second.append(f"{dot if second.plain else ''}{when}", style="")
    return Text("\n").join([first, second]) if second.plain else first


def time_text(plan: TrainPlan) -> str:
    """Steps, how long they take, and when it would be over; empty without data."""
    from edgepeft.plan.speed import say_time

    if plan.data is None:
        return ""
    steps = f"{plan.steps:,} steps"
    if plan.seconds is None:
        return f"{steps}, time n/a"
    ends = time.strftime("%H:%M", time.localtime(now() + plan.seconds))
    days = f" in {plan.seconds / 86400:.0f} d" if plan.seconds > 20 * 3600 else ""
    return f"{steps} in {say_time(plan.seconds)}, ETA {ends}{days}"


def data_text(view: PlanView) -> str:
    """Samples and their lengths, on one line."""
    data, dot = view.plan.data, f" {glyphs().dot} "
    if data is None:
        return f"no data chosen: planned for the preset's length{dot}d chooses a file"
    about = "about " if data.estimated else ""
    share = format_share(data.trained_tokens / max(1, data.tokens), digits=0)
    parts = [
        f"{data.samples:,} samples",
        f"p50 {data.length_p50:,}{dot}p99 {data.length_p99:,}{dot}longest {data.length_max:,} tokens",
        f"{about}{format_count(data.tokens)} tokens, {share} trained",
        f"{data.eval_samples:,} held out",
    ]
    return dot.join(parts)


def glance_text(glance: Glance) -> Text:
    """What a value under the cursor would do."""
    if glance.wrong:
        return Text(visible(glance.wrong), style="yellow")
    if glance.memory is None:
        return Text("")
    peak = glance.memory.peak_bytes
    return spare_text(peak, round(peak * glance.memory.uncertainty), glance.budget_bytes)


def trial_text(view: PlanView, what: str, text: str, glance: Glance) -> Text:
    """A value under the cursor beside the plan as it is."""
    memory = view.memory
    now_is = spare_text(memory.peak_bytes, round(memory.peak_bytes * memory.uncertainty), view.plan.spec.budget_bytes)
    return Text.assemble(
        (f"{visible(what)} {visible(text)[:24] or 'auto'}: ", "bold"), glance_text(glance), "\nas it is: ", now_is
    )


def refusal_text(refusal: Refusal, width: int) -> Text:
    """Why there is no plan, and what would help."""
    text = Text(visible(refusal.text), style="bold red" if not refusal.fits else "yellow")
    if refusal.ways:
        text.append("\nWhat would help:", style="bold")
        for way in refusal.ways[:5]:
            text.append(f"\n {glyphs().dot} {visible(way)}", style="")
    return text


def command_text(question: Question, name: str | None = None) -> str:
    """The command that does the same in a shell; empty where a value cannot be read."""
    from edgepeft.errors import UsageError
    from edgepeft.plan.options import command_line

    data = str(Path(question.data).expanduser().absolute()) if question.data is not None else None
    try:
        return shlex.join(command_line(question.model, data, question.values, name))
    except UsageError:
        return ""


def started_question(view: PlanView, running: tuple[str, ...]) -> str:
    """What is said before the adapter gets its name."""
    plan = view.plan
    lines = [f"{time_text(plan)}, {format_bytes(plan.memory.peak_bytes)} at the peak."]
    if running:
        lines.append(f"{', '.join(running[:3])} trains now; both would share this machine.")
    lines.append("How is the adapter to be called? A name that exists gets its next version.")
    return "\n".join(lines)
