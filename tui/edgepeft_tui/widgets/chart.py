"""Curves over the steps of a run, and level lines across them."""

from __future__ import annotations

from typing import Literal

import msgspec
from rich.text import Text
from textual.color import Color
from textual_plotext import PlotextPlot

from edgepeft_tui.glyphs import UNICODE, glyphs
from edgepeft_tui.series import Curve, fitted, round_ticks
from edgepeft_tui.text import drawable

Ink = Literal["accent", "success", "secondary", "foreground", "error"]
"""A colour of the theme."""
Stroke = Literal["line", "thin", "points", "dashes", "double"]

_SIGNS: dict[Stroke, tuple[str, str]] = {
    "line": ("braille", "*"),
    "thin": ("·", "."),
    "points": ("◆", "o"),
    "dashes": ("╌", "-"),
    "double": ("═", "="),
}
"""plotext's markers, in Unicode and in ASCII; each tells its curve without colour."""
_DOTS = {"braille": 2}
"""Points of a curve that one column can show; one where it is not said."""
_AXIS_FROM_LINES = 8
_LABELS = 9
"""Columns that the numbers of the vertical axis take at the most."""


class Line(msgspec.Struct, frozen=True):
    """A curve of the chart."""

    curve: Curve
    stroke: Stroke
    ink: Ink


class Level(msgspec.Struct, frozen=True):
    """A line across the whole chart."""

    y: float
    stroke: Stroke
    ink: Ink


class Picture(msgspec.Struct, frozen=True):
    """What a chart shows."""

    lines: tuple[Line, ...] = ()
    levels: tuple[Level, ...] = ()
    steps: int = 0
    """Right end of the horizontal axis; 0 ends it at the last point."""
    from_zero: bool = False
    """Whether the vertical axis begins at zero."""
    waiting: str = ""
    """What is said while there is nothing to draw."""


class Drawing(msgspec.Struct, frozen=True):
    """A chart with its words."""

    picture: Picture
    title: str
    subtitle: str = ""


def sign_of_stroke(stroke: Stroke) -> str:
    """The sign that stands for a stroke in a title."""
    sign = _SIGNS[stroke][glyphs() is not UNICODE]
    return "─" if sign == "braille" else sign


class Chart(PlotextPlot):  # type: ignore[misc]  # it has no annotations
    """Draws a picture to its size; curves with more points than columns are averaged."""

    def __init__(self, *, id: str, classes: str = "") -> None:
        super().__init__(id=id, classes=classes)
        self._picture = Picture()

    @property
    def picture(self) -> Picture:
        """What is shown."""
        return self._picture

    def draw(self, drawing: Drawing) -> None:
        """Shows a picture within its words; nothing happens when it is the one that is shown."""
        self.border_title, self.border_subtitle = Text(drawing.title).markup, Text(drawing.subtitle).markup
        if drawing.picture != self._picture:
            self._picture = drawing.picture
            self.refresh()

    def render(self) -> object:
        """The picture as it is now."""
        picture = self._picture
        drawn = [line for line in picture.lines if line.curve.xs]
        if not drawn and not (picture.levels and picture.steps):
            return Text(picture.waiting, style="dim", justify="center")
        columns = max(8, self.size.width - _LABELS)
        plot = self.plt
        plot.clear_figure()
        self._set_axes(picture, drawn, columns)
        for level in picture.levels:
            right = self._right
            xs = [right * index / (2 * columns) for index in range(2 * columns + 1)]
            self._trace(Curve(tuple(xs), tuple([level.y] * len(xs))), level.stroke, level.ink, scatter=True)
        for line in drawn:
            sign = _SIGNS[line.stroke][glyphs() is not UNICODE]
            points = line.curve if line.stroke == "points" else fitted(line.curve, columns * _DOTS.get(sign, 1))
            self._trace(points, line.stroke, line.ink, scatter=line.stroke == "points")
        drawn = super().render()
        # The axes are plotext's own signs.
        drawn.plain = drawable(drawn.plain)
        return drawn

    def _set_axes(self, picture: Picture, drawn: list[Line], columns: int) -> None:
        plot = self.plt
        highest = max([*(max(line.curve.ys) for line in drawn), *(level.y for level in picture.levels)])
        lowest = 0.0 if picture.from_zero else min(min(line.curve.ys) for line in drawn)
        room = (highest - lowest) * 0.05 or abs(highest) * 0.1 or 1.0
        bottom, top = (0.0 if picture.from_zero else lowest - room), highest + room
        self._right = float(picture.steps or max(line.curve.xs[-1] for line in drawn) or 1)
        plot.xlim(0, self._right)
        plot.ylim(bottom, top)
        if self.size.height < _AXIS_FROM_LINES:
            # The little room there is belongs to the curves; the bar below tells the step.
            across: list[float] = []
        else:
            across = [tick for tick in round_ticks(0, self._right, max(3, columns // 10)) if tick == int(tick)]
        plot.xticks(across, [f"{tick:,.0f}" for tick in across])
        up = round_ticks(bottom, top, max(2, min(6, self.size.height // 3)))
        plot.yticks(up, [f"{tick:.3g}".rjust(5) for tick in up])
        plot.xaxes(bool(across), False)
        plot.yaxes(True, False)

    def _trace(self, curve: Curve, stroke: Stroke, ink: Ink, *, scatter: bool) -> None:
        color = Color.parse(self.app.theme_variables.get(ink, "#808080")).rgb
        sign = _SIGNS[stroke][glyphs() is not UNICODE]
        draw = self.plt.scatter if scatter else self.plt.plot
        draw(list(curve.xs), list(curve.ys), marker=sign, color=color)
