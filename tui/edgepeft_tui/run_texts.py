"""Longer texts about a run, for reading."""

from __future__ import annotations

from edgepeft.runs.launch import log_tail
from edgepeft.runs.layout import open_run
from edgepeft.units import format_bytes, format_seconds
from edgepeft_tui.run_view import RunView

_LOG_LINES = 200


def read_log(run_id: str) -> str:
    """The tail of a run's worker.log, with where it lies.

    Raises:
        EdgepeftError: there is no such run, or its log may not be read.
    """
    run = open_run(run_id)
    lines = log_tail(run, _LOG_LINES)
    return "\n".join([str(run.log_file), "", *(lines or ["The worker has written nothing there."])])


def read_details(run_id: str) -> str:
    """What a run was planned as, and where its files lie.

    Raises:
        BadInput: there is no such run, or its plan is damaged.
    """
    run = open_run(run_id)
    plan = run.read_plan()
    recipe, peak = plan.spec.recipe, plan.memory.peak
    lines = [
        f"{'model':<20} {recipe.base.model}",
        f"{'data':<20} {recipe.data.path}",
        f"{'steps':<20} {plan.steps:,} of {recipe.samples_per_step} samples",
        f"{'predicted peak':<20} {format_bytes(peak.total_bytes)} ({peak.name})"
        + (f", budget {format_bytes(plan.spec.budget_bytes)}" if plan.spec.budget_bytes else ""),
    ]
    if plan.seconds is not None:
        lines.append(f"{'predicted time':<20} {format_seconds(plan.seconds)}")
    lines.append("")
    lines += [f"{choice.what:<20} {choice.value:<14} {choice.origin:<7} {choice.why}" for choice in plan.choices]
    lines += ["", *(f"note  {note}" for note in plan.notes)] if plan.notes else []
    lines += ["", f"{'folder':<20} {run.path}", f"{'in a shell':<20} edgepeft runs show {run.id}"]
    return "\n".join(lines)


def sample_text(view: RunView) -> str:
    """Every answer that was given during training, the newest first."""
    parts = [
        f"{f'After step {sample.step:,}' if sample.step else 'The base alone'}\n\n{sample.prompt}\n\n  {sample.answer}"
        for sample in reversed(view.samples)
    ]
    return "\n\n".join(parts)
