"""How the Train screen learns of runs: all of them for its list, the chosen one in detail, each in a thread."""

from __future__ import annotations

import time
from time import time as now
from typing import TYPE_CHECKING

from textual import on, work
from textual.worker import get_current_worker

from edgepeft.errors import BadInput, EdgepeftError
from edgepeft.paths import home
from edgepeft_tui.readings import Row, listed_runs, row_of_run
from edgepeft_tui.run_messages import CommandDone, RunFollowed, RunsListed, RunUnreadable
from edgepeft_tui.run_view import RunView
from edgepeft_tui.screens.run_commands import RunCommands
from edgepeft_tui.widgets.run_figures import RunFigures
from edgepeft_tui.widgets.shelf import Shelf

if TYPE_CHECKING:
    from edgepeft.runs.state import RunSummary

LIST_SECONDS = 1.0
FOLLOW_SECONDS = 0.1
"""Between two looks at a run that says something: at most ten updates a second."""
QUIET_SECONDS = 0.5
"""Between two looks at a run that says nothing."""


class RunFollowing(RunCommands):
    """Keeps the list of runs and follows the chosen one, also while another screen is shown."""

    def __init__(self) -> None:
        super().__init__()
        self._wanted = ""
        """The run that was asked for and is not in the list yet."""
        self._summaries: dict[str, RunSummary] = {}
        self._overlay_id = ""
        self._overlay: RunView | None = None

    def show_view(self) -> None:
        """Shows the chosen run as it was last seen."""
        raise NotImplementedError

    # The list.

    def _look_if_seen(self) -> None:
        if self._app.current_mode == self.AREA:
            self._look_at_runs()

    @work(thread=True, exclusive=True, group="list", exit_on_error=False)
    def _look_at_runs(self) -> None:
        worker = get_current_worker()
        rows: list[Row] = []
        summaries: dict[str, RunSummary] = {}
        known = bool(self._summaries)
        try:
            for chunk in listed_runs().read_in_chunks():
                rows += [row_of_run(run, now()) for run in chunk]
                summaries |= {run.id: run for run in chunk}
                if worker.is_cancelled:
                    return
                if not known:
                    # The first look: what is there is shown before the rest is read.
                    self.post_message(RunsListed(tuple(rows), dict(summaries), complete=False))
        except (EdgepeftError, OSError) as error:
            self.post_message(RunUnreadable("", str(error)))
            return
        self.post_message(RunsListed(tuple(rows), summaries, complete=True))

    @on(RunsListed)
    def _runs_listed(self, message: RunsListed) -> None:
        if not message.complete and len(message.rows) < len(self._summaries):
            return
        shelf = self.query_one("#runs", Shelf)
        self._summaries = message.summaries
        shelf.show_rows(message.rows)
        alive = sum(run.state.alive for run in message.summaries.values())
        shelf.border_title = "Runs (r)"
        shelf.border_subtitle = f"{len(message.rows)}, {alive} active" if message.rows else ""
        if self._wanted and shelf.select(self._wanted):
            self._wanted = ""
        elif self._wanted:
            pass
        elif message.complete and self._chosen and message.rows and self._chosen not in message.summaries:
            # It was removed, here or elsewhere.
            row = shelf.selected_row
            self._choose(row.key if row is not None else message.rows[0].key)
        elif not self._chosen and message.rows:
            running = [row.key for row in message.rows if row.mark == "running"]
            first = (running or [message.rows[0].key])[0]
            shelf.select(first)
            self._choose(first)
        elif message.complete and not message.rows:
            self._nothing_chosen()

    # Following.

    def _choose(self, run: str) -> None:
        if run == self._chosen:
            return
        self._chosen, self._view = run, None
        if self._overlay_id == run:
            self._overlay_id, self._overlay = "", None
        figures = self.query_one(RunFigures)
        figures.view, figures.trouble, figures.asked = None, "", ""
        self._follow(run, self._overlay_id)

    def _nothing_chosen(self) -> None:
        self._chosen, self._view = "", None
        self.workers.cancel_group(self, "follow")
        self.show_view()

    @work(thread=True, exclusive=True, group="follow", exit_on_error=False)
    def _follow(self, run: str, overlay: str) -> None:
        from edgepeft.runs.layout import open_run
        from edgepeft_tui.watching import RunViewer

        worker = get_current_worker()
        try:
            viewer = RunViewer(open_run(run))
            beside = RunViewer(open_run(overlay)) if overlay else None
            told_at = 0.0
            before: RunView | None = None
            while True:
                if not viewer.run.path.is_dir():
                    raise BadInput(f"run {run} was removed")
                view, new = viewer.look()
                beside_view, beside_new = beside.look() if beside is not None else (None, False)
                new = new or beside_new or before is None or view.state.status != before.state.status
                if worker.is_cancelled:
                    return
                if new or time.monotonic() - told_at > 1.0:
                    self.post_message(RunFollowed(view, beside_view))
                    told_at = time.monotonic()
                before = view
                time.sleep(FOLLOW_SECONDS if view.state.alive else QUIET_SECONDS)
        except (EdgepeftError, OSError) as error:
            self.post_message(RunUnreadable(run, str(error), there=(home().runs / run).is_dir()))

    @on(RunFollowed)
    def _run_followed(self, message: RunFollowed) -> None:
        view, before = message.view, self._view
        if view.id != self._chosen:
            return
        self._view, self._overlay = view, message.overlay
        if view.rescued:
            self._app.tell(f"{view.id}: {view.rescued}", severity="warning", seconds=12)
        if before is not None and before.state.alive and not view.state.alive:
            self._tell_end(view)
            self._look_at_runs()
        if self._app.current_mode == self.AREA:
            self.show_view()

    def _tell_end(self, view: RunView) -> None:
        state = view.state
        self.say_asked("")
        if state.status in ("finished", "stopped"):
            name = f" as {state.published}" if state.published else ""
            memory = f"; {view.outcome[0]}" if view.outcome else ""
            chat = ". t chats with it" if view.adapter else ""
            self._app.tell(f"{view.id} {state.status}{name}{memory}{chat}", seconds=12)
        else:
            self._app.tell(f"{view.id}: {state.message or state.status}. l shows its log", severity="error", seconds=12)

    @on(RunUnreadable)
    def _run_unreadable(self, message: RunUnreadable) -> None:
        if message.run in ("", self._chosen):
            self._view = None
            hint = " d removes it." if message.run and message.there else ""
            self.query_one(RunFigures).trouble = message.why + hint
            self.show_view()

    @on(CommandDone)
    def _command_done(self, message: CommandDone) -> None:
        if message.said:
            self._app.tell(message.said)
        if message.command == "remove":
            shelf = self.query_one("#runs", Shelf)
            keys = [key for key in self._summaries if key != message.run]
            self._chosen = ""
            if keys and not shelf.select(keys[0]):
                self._nothing_chosen()
        if message.command in ("resume", "end"):
            self.say_asked("")
        self._look_at_runs()
