"""The charts of a run: which curves, which level lines, and the words around them."""

from __future__ import annotations

import msgspec

from edgepeft.runs.text import error_text
from edgepeft.units import GIB, MIB, format_bytes
from edgepeft_tui.run_view import RunView
from edgepeft_tui.series import Curve
from edgepeft_tui.text import visible
from edgepeft_tui.widgets.chart import Drawing, Level, Line, Picture, Stroke, sign_of_stroke

CHARTS = ("loss", "memory", "rate", "norm")
"""What the left chart can show; memory only where it has no chart of its own."""
_NAMES = {"loss": "Loss", "rate": "Learning rate", "norm": "Gradient norm"}
_BUDGET_IN_SIGHT = 4.0
"""A budget that is more than this many times the prediction would press the curves flat and is told in words."""


def curve_picture(kind: str, view: RunView | None, overlay: RunView | None, width: int) -> Drawing:
    """The left chart.

    Args:
        kind: one of `CHARTS`.
        view: the run; None while there is none.
        overlay: the run whose loss is drawn beside.
        width: columns of the chart.
    """
    if kind == "memory":
        drawn = memory_picture(view, width)
        return msgspec.structs.replace(drawn, title=drawn.title.replace("Memory", "Memory (c)", 1))
    waiting = "" if view is None else "The first step has not been done yet"
    if view is None:
        return Drawing(Picture(waiting=waiting), f"{_NAMES[kind]} (c)")
    curves = view.curves
    if kind == "rate":
        alone = (Line(curves.rate, "line", "accent"),)
        return Drawing(Picture(alone, from_zero=True, waiting=waiting), "Learning rate (c)")
    if kind == "norm":
        alone = (Line(curves.norm, "line", "accent"),)
        return Drawing(Picture(alone, from_zero=True, waiting=waiting), "Gradient norm (c)", "before clipping")
    lines: tuple[Line, ...] = (Line(curves.loss, "line", "accent"), Line(curves.held_out, "points", "success"))
    words: list[tuple[Stroke, str]] = [("line", "train"), ("points", "held out")]
    if overlay is not None:
        lines = (Line(overlay.curves.loss, "thin", "secondary"), *lines)
        words.insert(1, ("thin", visible(overlay.id)))
    best = min(curves.held_out.ys, default=None)
    subtitle = "" if best is None else f"best held out {best:.4f}"
    return Drawing(Picture(lines, waiting=waiting), _titled("Loss (c)", words, width), subtitle)


def memory_picture(view: RunView | None, width: int) -> Drawing:
    """Measured memory over the steps, under the lines of the prediction and the budget.

    Args:
        view: the run; None while there is none.
        width: columns of the chart.
    """
    if view is None:
        return Drawing(Picture(), "Memory")
    predicted, budget = view.predicted_bytes, view.budget_bytes
    size, unit = (GIB, "GiB") if max(predicted, view.state.peak_bytes or 0) >= 100 * MIB else (MIB, "MiB")
    lines = (
        Line(_scaled(view.curves.live_bytes, size), "thin", "secondary"),
        Line(_scaled(view.curves.peak_bytes, size), "line", "accent"),
    )
    words: list[tuple[Stroke, str]] = [("line", "peak")]
    levels: list[Level] = []
    if predicted:
        levels.append(Level(predicted / size, "dashes", "foreground"))
        words.append(("dashes", "predicted"))
    subtitle = ""
    if view.state.peak_bytes is not None and predicted:
        peak = view.state.peak_bytes
        subtitle = f"peak {peak / size:.2f} of {predicted / size:.2f} {unit} ({error_text(peak, predicted)})"
    if budget and predicted:
        if budget <= _BUDGET_IN_SIGHT * max(predicted, view.state.peak_bytes or 0):
            levels.append(Level(budget / size, "double", "error"))
            words.append(("double", "budget"))
        elif width >= len(subtitle) + 20:
            subtitle += f", budget {format_bytes(budget)}"
    words.append(("thin", "now"))
    steps = 0 if view.curves.peak_bytes.xs else view.state.steps
    return Drawing(
        Picture(lines, tuple(levels), steps=steps, from_zero=True), _titled(f"Memory, {unit}", words, width), subtitle
    )


def _titled(title: str, words: list[tuple[Stroke, str]], width: int) -> str:
    """The title with as many of the signs' meanings as fit."""
    for word in words:
        longer = f"{title}  {sign_of_stroke(word[0])} {word[1]}"
        if len(longer) > width - 4:
            break
        title = longer
    return title


def _scaled(curve: Curve, size: int) -> Curve:
    return Curve(curve.xs, tuple(y / size for y in curve.ys))
