"""Train: every run, the chosen one's curves and figures, and what can be done with it."""

from __future__ import annotations

import time
from functools import partial
from time import time as now
from typing import Any, ClassVar

from rich.text import Text
from textual import events, on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.timer import Timer
from textual.widgets import OptionList, Static

from edgepeft_tui.actions import bindings
from edgepeft_tui.readings import row_of_run
from edgepeft_tui.run_view import Sample
from edgepeft_tui.screens.dialogs import Pick
from edgepeft_tui.screens.run_following import LIST_SECONDS, RunFollowing
from edgepeft_tui.text import visible, visible_lines
from edgepeft_tui.widgets.event_log import EventLog
from edgepeft_tui.widgets.run_figures import RunFigures
from edgepeft_tui.widgets.shelf import Shelf

DRAW_SECONDS = 0.4
"""Least time between two drawings of the charts, which cost more than all figures."""
CHOOSE_SECONDS = 0.15
"""How long a row is highlighted before its run is read."""


class TrainScreen(RunFollowing):
    """Follows the highlighted run in a thread, also while another screen is shown."""

    AREA = "train"
    CSS_PATH = "train.tcss"
    BINDINGS: ClassVar[list[BindingType]] = bindings("train")
    HELP = (
        "Train shows every run and follows the highlighted one: loss, memory against the prediction, figures, events. "
        "Space pauses and resumes, s stops and saves, o draws another run's loss beside, c changes what the chart "
        "shows, t chats with the adapter, v reads samples, i tells of the plan, l shows the worker's log."
    )

    def __init__(self) -> None:
        super().__init__()
        self._chart = "loss"
        self._sample: tuple[Sample | None] | None = None
        self._choosing: Timer | None = None
        self._drawn_at = 0.0
        self._drawing: Timer | None = None

    def content(self) -> ComposeResult:
        """The list, two charts, the figures, events and the last sample."""
        from edgepeft_tui.widgets.chart import Chart

        with Vertical(id="train"):
            yield Shelf("Runs (r)", "No run yet: n plans one", id="runs")
            with Vertical(id="run"):
                with Horizontal(id="charts"):
                    yield Chart(id="curve", classes="frame")
                    yield Chart(id="memory", classes="frame")
                yield RunFigures(id="figures")
                with Horizontal(id="told"):
                    yield EventLog(id="events", classes="frame")
                    with VerticalScroll(id="sample", classes="frame"):
                        yield Static("", markup=False)

    def on_mount(self) -> None:
        """Looks at the runs at once, then at intervals."""
        self.query_one("#events").border_title = "Events (e)"
        self.query_one("#sample").border_title = "Sample (v)"
        self.set_interval(LIST_SECONDS, self._look_if_seen)
        self._look_at_runs()
        self.show_view()

    def on_screen_resume(self) -> None:
        """Comes back: shows what was followed meanwhile."""
        self._look_at_runs()
        self.show_view()

    def on_resize(self, event: events.Resize) -> None:
        """Titles have as many words as fit."""
        self.call_after_refresh(self._draw_charts)

    def show(self, run: str = "", **what: Any) -> None:
        """Shows this run, also one that was made a moment ago."""
        if run:
            self._wanted = run
            self._choose(run)
            self._look_at_runs()

    @on(OptionList.OptionHighlighted)
    def _row_highlighted(self) -> None:
        row = self.query_one("#runs", Shelf).selected_row
        if row is None or row.key == self._chosen or self._wanted:
            return
        if self._choosing is not None:
            self._choosing.stop()
        self._choosing = self.set_timer(CHOOSE_SECONDS, partial(self._choose, row.key))

    @on(OptionList.OptionSelected)
    def _row_selected(self) -> None:
        row = self.query_one("#runs", Shelf).selected_row
        if row is not None and row.key != self._chosen:
            # A click on another run; a second one, or enter, does what is next.
            self._choose(row.key)
        elif self._view is not None and self._view.state.resumable:
            self.ask_to_resume(self._view)
        else:
            self.action_details()

    # Showing.

    def say_asked(self, text: str) -> None:
        """Shows what was asked of the worker and has not happened yet."""
        self.query_one(RunFigures).asked = text

    def show_view(self) -> None:
        """Shows the chosen run as it was last seen; the charts not more often than `DRAW_SECONDS` lets."""
        view = self._view
        figures = self.query_one(RunFigures)
        if view is not None:
            figures.trouble = ""
        figures.view = view
        self.query_one(EventLog).show(view.log if view is not None else ())
        self._show_sample(view.samples[-1] if view is not None and view.samples else None)
        self._draw_soon()

    def _show_sample(self, sample: Sample | None) -> None:
        if self._sample == (sample,):
            return
        self._sample = (sample,)
        frame = self.query_one("#sample")
        frame.border_title = "Sample (v)" if sample is None else f"Sample after step {sample.step:,} (v: all)"
        text = Text("Answers that are given during training appear here.", style="dim")
        if sample is not None:
            text = Text(visible_lines(sample.prompt[:2000]) + "\n", style="dim")
            text.append(visible_lines(sample.answer[:4000]), style="not dim")
        frame.query_one(Static).update(text)

    def _draw_soon(self) -> None:
        """Draws the charts one after the other: together they would hold everything else up for too long."""
        if self._drawing is None:
            wait = self._drawn_at + DRAW_SECONDS - time.monotonic()
            self._drawing = self.set_timer(max(0.001, wait), self._draw_curve_then_memory)

    def _draw_curve_then_memory(self) -> None:
        self._draw_curve()
        self._drawing = self.set_timer(max(0.001, DRAW_SECONDS / 2), self._draw_memory)

    def _draw_charts(self) -> None:
        self._draw_curve()
        self._draw_memory()

    def _draw_curve(self) -> None:
        from edgepeft_tui.run_pictures import curve_picture
        from edgepeft_tui.widgets.chart import Chart

        self._drawn_at = time.monotonic()
        chart = self.query_one("#curve", Chart)
        chart.draw(curve_picture(self._chart, self._view, self._overlay, chart.size.width))

    def _draw_memory(self) -> None:
        from edgepeft_tui.run_pictures import memory_picture
        from edgepeft_tui.widgets.chart import Chart

        self._drawing = None
        chart = self.query_one("#memory", Chart)
        chart.draw(memory_picture(self._view, chart.size.width))

    # Actions that only show.

    def action_focus_part(self, part: str) -> None:
        """Moves the focus to the list or to the events."""
        self.query_one(f"#{part}").focus()

    def action_next_chart(self) -> None:
        """Shows the next curve; where there is one chart only, the memory is among them."""
        from edgepeft_tui.run_pictures import CHARTS

        kinds = [kind for kind in CHARTS if kind != "memory" or self.has_class("-narrow")]
        self._chart = kinds[(kinds.index(self._chart) + 1) % len(kinds)] if self._chart in kinds else kinds[0]
        self._draw_charts()

    def action_overlay(self) -> None:
        """Draws another run's loss beside; asks which."""
        others = [run for run in self._summaries.values() if run.id != self._chosen and run.state.step]
        if not others:
            self._app.tell("There is no other run with steps to draw beside")
            return
        rows = [(run.id, f"{run.id}   {row_of_run(run, now()).text}") for run in others]
        if self._overlay_id:
            rows.insert(0, ("", f"none ({self._overlay_id} is drawn now)"))
        self._app.push_screen(Pick("Whose loss shall be drawn beside?", rows, title="Overlay"), self._lay_over)

    def _lay_over(self, run: str | None) -> None:
        if run is None or run == self._overlay_id:
            return
        self._overlay_id, self._overlay, self._chart = run, None, "loss"
        self._follow(self._chosen, run)

    async def action_chat(self) -> None:
        """Goes to a chat with the adapter of the run."""
        view = self._seen()
        if view is None:
            return
        if not view.adapter:
            ended = "it has none" if not view.state.alive else "it is saved when the run ends; s stops and saves now"
            self._app.tell(f"{view.id} has no adapter yet: {ended}")
            return
        await self._app.go("chat", adapter=view.adapter)

    async def action_new_run(self) -> None:
        """Plans a new run."""
        await self._app.go("plan")

    def action_show_log(self) -> None:
        """Shows the tail of worker.log."""
        from edgepeft_tui.run_texts import read_log

        if self._chosen:
            self.read_text(f"worker.log of {visible(self._chosen)}", partial(read_log, self._chosen))

    def action_details(self) -> None:
        """Shows what the run was planned as."""
        from edgepeft_tui.run_texts import read_details

        if self._chosen:
            self.read_text(visible(self._chosen), partial(read_details, self._chosen))

    def action_samples(self) -> None:
        """Shows every answer that was given during training."""
        from edgepeft_tui.run_texts import sample_text

        view = self._seen()
        if view is not None and view.samples:
            self.read_text(f"Samples of {visible(view.id)}", partial(sample_text, view))
        elif view is not None:
            self._app.tell(f"{view.id} gave no sample; the plan's sample prompts say what is asked during training")
