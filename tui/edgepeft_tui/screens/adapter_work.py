"""The half of the Adapters screen that works: one piece at a time, told while it runs, and its figures at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from rich.text import Text
from textual import on, work
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Static
from textual.worker import Worker, get_current_worker

from edgepeft.errors import EdgepeftError, Interrupted
from edgepeft.processes import Progress
from edgepeft_tui import adapter_work
from edgepeft_tui.adapter_work import Outcome, Work
from edgepeft_tui.glyphs import glyphs
from edgepeft_tui.screens.adapter_forms import average_form, compose_form, export_form, import_form, merge_form
from edgepeft_tui.screens.form import Form, Values
from edgepeft_tui.screens.room import Room
from edgepeft_tui.text import visible

_SECONDS = 0.1
"""Between two words on how far the work is."""
_BAR = 24


@dataclass
class WorkProgressed(Message):
    """The work goes on."""

    what: str
    fraction: float | None

    def can_replace(self, message: Message) -> bool:
        """Only the last word counts."""
        return isinstance(message, WorkProgressed)


@dataclass
class WorkEnded(Message):
    """The work is done, or it failed."""

    outcome: Outcome | None
    error: Exception | None = None


class WorkScreen(Room):
    """Asks for what a piece of work needs, does it in a thread, and says what came of it."""

    def __init__(self) -> None:
        super().__init__()
        self._worker: Worker[None] | None = None
        self._doing = ""
        self._before: dict[str, Values] = {}

    def work_pane(self) -> Widget:
        """Where the work is told."""
        pane = Static("", id="work-pane", classes="frame", markup=False)
        pane.display = False
        return pane

    def read_again(self) -> None:
        """Reads the library anew."""
        raise NotImplementedError

    # Asking.

    def ask_compose(self, references: Sequence[str]) -> None:
        """Asks how adapters are added up, and does it."""
        kind = f"compose {' '.join(references)}"
        form = compose_form(references, self._before.get(kind, {}))
        self._ask(kind, form, "composing", partial(adapter_work.compose, references))

    def ask_average(self, references: Sequence[str]) -> None:
        """Asks how adapters are averaged, and does it."""
        kind = f"average {' '.join(references)}"
        form = average_form(references, self._before.get(kind, {}))
        self._ask(kind, form, "averaging", partial(adapter_work.average, references))

    def ask_merge(self, reference: str) -> None:
        """Asks where a merged model goes, and makes it."""
        kind = f"merge {reference}"
        form = merge_form(reference, self._before.get(kind, {}))
        self._ask(kind, form, f"merging {reference}", partial(adapter_work.merge, reference))

    def ask_export(self, reference: str) -> None:
        """Asks where an export goes, and makes it."""
        kind = f"export {reference}"
        form = export_form(reference, self._before.get(kind, {}))
        self._ask(kind, form, f"exporting {reference}", partial(adapter_work.export, reference))

    def action_import(self) -> None:
        """Asks for a folder or a file, and copies it into the library."""
        form = import_form(self._before.get("import", {}))
        self._ask("import", form, "importing", adapter_work.import_path)

    def do_roll_back(self, name: str, version: int) -> None:
        """Makes a name mean an older version again."""
        self._start(f"rolling {name} back", partial(adapter_work.roll_back, name, version))

    def do_remove(self, name: str, version: int | None) -> None:
        """Deletes versions."""
        self._start(f"deleting {name}", partial(adapter_work.remove, name, version))

    def _ask(self, kind: str, form: Form, doing: str, do: Callable[[Values, Progress], Outcome]) -> None:
        if self._refuse_second():
            return

        def start(values: Values | None) -> None:
            if values is not None:
                self._before[kind] = values
                self._start(doing, partial(do, values))

        self.app.push_screen(form, start)

    # Doing.

    def _refuse_second(self) -> bool:
        if self._worker is not None:
            self._app.tell(f"Still {self._doing}: one piece of work at a time; s stops it", severity="warning")
        return self._worker is not None

    def _start(self, doing: str, do: Work) -> None:
        if not self._refuse_second():
            self._doing = doing
            self._tell_progress("starting", None)
            self._worker = self._do(do)

    @work(thread=True, group="work", exit_on_error=False)
    def _do(self, do: Work) -> None:
        worker, told = get_current_worker(), 0.0

        def progress(what: str, fraction: float | None) -> None:
            nonlocal told
            if worker.is_cancelled:
                # This ends the process that works, and what it began is removed.
                raise Interrupted("stopped; nothing was kept")
            if time.monotonic() - told >= _SECONDS:
                told = time.monotonic()
                self.post_message(WorkProgressed(what, fraction))

        try:
            ended = WorkEnded(do(progress))
        except (EdgepeftError, OSError) as error:
            ended = WorkEnded(None, error)
        self.post_message(ended)

    @on(WorkProgressed)
    def _work_progressed(self, message: WorkProgressed) -> None:
        if self._worker is not None and not self._worker.is_cancelled:
            self._tell_progress(message.what, message.fraction)

    @on(WorkEnded)
    def _work_ended(self, message: WorkEnded) -> None:
        self._worker = None
        text = Text()
        if message.error is not None:
            stopped = isinstance(message.error, Interrupted)
            sign, style = (glyphs().paused, "") if stopped else (glyphs().trouble, "red")
            text.append(f"{sign} {visible(self._doing)}: {visible(str(message.error))}", style=style)
            if not stopped:
                self._app.tell_error(message.error)
        elif message.outcome is not None:
            for number, said in enumerate(message.outcome.lines):
                sign = "\n  " if number else f"{glyphs().done} "
                text.append(sign + visible(said.text), style="yellow" if said.careful else "")
            if message.outcome.name:
                self.show(adapter=message.outcome.name)
        self._tell(text)
        self.read_again()

    def action_stop(self) -> None:
        """Stops the work; without any, takes its words away."""
        if self._worker is None:
            self.query_one("#work-pane").display = False
            return
        self._worker.cancel()
        self._tell(Text(f"{visible(self._doing)}: stopping …"))

    def _tell_progress(self, what: str, fraction: float | None) -> None:
        line = Text(f"{visible(self._doing)}: {visible(what)}  ")
        if fraction is not None:
            full = round(max(0.0, min(1.0, fraction)) * _BAR)
            line.append(glyphs().full * full + glyphs().empty * (_BAR - full), style="green")
            line.append(f" {100 * fraction:3.0f} %")
        line.append("   s stops it", style="dim")
        self._tell(line)

    def _tell(self, text: Text) -> None:
        pane = self.query_one("#work-pane", Static)
        pane.update(text)
        pane.display = True
