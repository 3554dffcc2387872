"""What can be done on the Plan screen."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.text import Text
from textual import on, work

from edgepeft.errors import EdgepeftError
from edgepeft.paths import as_name, check_name
from edgepeft_tui.plan_messages import LaunchEnded
from edgepeft_tui.plan_text import command_text, started_question
from edgepeft_tui.screens.dialogs import Ask, Choice, Pick, Reading
from edgepeft_tui.screens.plan_dialogs import Chooser, DataPreview
from edgepeft_tui.screens.room import Room
from edgepeft_tui.widgets.choice_table import ChoiceTable
from edgepeft_tui.widgets.others_list import other_lines

if TYPE_CHECKING:
    from edgepeft.plan.train_plan import TrainPlan
    from edgepeft_tui.choice_rows import ChoiceRow
    from edgepeft_tui.finds import Found
    from edgepeft_tui.plan_desk import Desk
    from edgepeft_tui.plans import OtherRow, Planner, PlanView, Question, Refusal


class PlanActions(Room):
    """The actions; what they need of the screen is named first."""

    planner: Planner
    desk: Desk
    view: PlanView | None
    refusal: Refusal | None
    adapter_name: str

    def change(self, question: Question, *, undoable: bool = True) -> None:
        """Asks something else."""
        raise NotImplementedError

    def set_value(self, what: str, text: str) -> None:
        """Sets one value."""
        raise NotImplementedError

    def open_editor(self, row: ChoiceRow) -> None:
        """Edits a row."""
        raise NotImplementedError

    # Values ------------------------------------------------------------------------------------------------------

    def action_edit(self, what: str = "") -> None:
        """Edits the highlighted row, or the one of that name."""
        table = self.query_one(ChoiceTable)
        if what:
            table.go_to(what)
        row = table.row
        if row is None or (what and row.what != what):
            self._app.tell("Choose a model first: m")
            return
        self.open_editor(row)

    def action_automatic(self) -> None:
        """Gives the highlighted value back to the planner."""
        row = self.query_one(ChoiceTable).row
        if row is not None and row.what in self.desk.question.values:
            self.set_value(row.what, "")

    def action_undo(self) -> None:
        """Takes the last change back."""
        before = self.desk.undone()
        if before is None:
            self._app.tell("There is nothing to take back")
        else:
            self.change(before, undoable=False)

    def action_focus_part(self, part: str) -> None:
        """Moves the focus."""
        widget = self.query_one(f"#{part}")
        if part == "others" and not self.query_one("#side").display:
            self._pick_other()
        else:
            widget.focus()

    def _pick_other(self) -> None:
        others = self.view.others if self.view is not None else ()
        if not others:
            self._app.tell("No other plan comes near this one")
            return
        rows = [(str(number), line.plain) for number, line in enumerate(other_lines(others))]

        def taken(answer: str | None) -> None:
            if answer is not None:
                self.take_other(others[int(answer)])

        self._app.push_screen(Pick("What to plan instead", rows, title="Others that fit"), taken)

    def take_other(self, other: OtherRow) -> None:
        """Plans a runner-up: its values become the user's; u takes them back."""
        if not other.fits:
            self._app.tell(f"{other.what}: {other.cost}", severity="warning")
            return
        question = self.desk.question
        values = question.values | other.changes
        if "method" in other.changes:
            from edgepeft.plan.options import OPTIONS

            lora = {"rank", "alpha", "targets", "dropout", "precision", "lora-plus-ratio"}
            values = {name: value for name, value in values.items() if name in OPTIONS and name not in lora}
        self.change(msgspec.structs.replace(question, values=values, verify=False))

    # Model and data ----------------------------------------------------------------------------------------------

    def action_choose_model(self, *, scan: bool = False) -> None:
        """Chooses among the store's models, those of this disk, and those that profiles describe."""
        from edgepeft_tui import finds

        known: dict[str, tuple[Found, ...]] = {}

        def matching(name: str, text: str) -> tuple[Found, ...]:
            if name not in known:
                known[name] = getattr(finds, name)()
            wanted = text.lower()
            return tuple(row for row in known[name] if wanted in f"{row.key} {row.note}".lower())

        order = ("store_models", "scanned_models", "described_models")
        readers = [partial(matching, name) for name in ((order[1], order[0], order[2]) if scan else order)]

        def taken(model: str | None) -> None:
            if model is not None:
                self.change(msgspec.structs.replace(self.desk.question, model=model, verify=False))

        question = "In the store, elsewhere on this disk, or a folder or GGUF file by its path."
        self._app.push_screen(Chooser(question, readers, title="Model", hint="name or path"), taken)

    def action_choose_data(self) -> None:
        """Chooses among files used before, the demo's, and those of the folder that is typed."""
        from edgepeft_tui import finds

        def recent(text: str) -> tuple[Found, ...]:
            return tuple(row for row in finds.recent_data() if text.lower() in row.key.lower())

        def taken(data: str | None) -> None:
            if data is not None:
                self.change(msgspec.structs.replace(self.desk.question, data=data, verify=False))

        question = "A json, jsonl, csv, tsv or parquet file: type a path, or take one that was used before."
        self._app.push_screen(Chooser(question, [recent, finds.files_like], title="Data", hint="path of a file"), taken)

    def action_demo(self) -> None:
        """Fills in the demo's model, data and values."""
        self.show(demo=True)

    def action_preview(self) -> None:
        """Shows the data as the model reads it."""
        from edgepeft_tui import finds

        question = self.desk.question
        if question.data is None:
            self._app.tell("There is no data yet: d chooses a file")
            return
        title = f"{Path(question.data).name} as {question.model} reads it"
        bins = self.view.bins if self.view is not None else ()
        read = partial(finds.drawn_samples, question.model, question.data, question.values)
        self._app.push_screen(DataPreview(title, bins, read))

    # Looking closer ----------------------------------------------------------------------------------------------

    def action_verify(self) -> None:
        """Starts a dry run of the plan in the background, or ends the one that runs."""
        question = self.desk.question
        if question.verify and self.desk.busy:
            self.desk.ask(msgspec.structs.replace(question, verify=False), undoable=False)
            self._app.tell("Dry run cancelled; the plan is as it was")
        elif self.view is None:
            self._app.tell("There is no plan to verify yet")
        elif self.view.plan.dry_run is not None and not self.desk.busy:
            self.action_explain(dry_run=True)
        else:
            self.desk.ask(msgspec.structs.replace(question, verify=True), undoable=False)

    def action_explain(self, dry_run: bool = False) -> None:
        """Tells everything that is known of the plan, or of its dry run beside the closed form."""
        if self.view is None:
            self._app.tell("There is no plan yet")
            return
        from edgepeft.plan.explain import dry_run_lines, explain

        plan, width = self.view.plan, max(50, min(104, self.size.width - 10))
        lines = dry_run_lines(plan.memory, plan.dry_run, width) if dry_run and plan.dry_run else explain(plan, width)
        text = Text()
        for line, tone in lines:
            text.append(f"{line}\n", style=tone)
        self._app.push_screen(Reading(text, title="Dry run beside the prediction" if dry_run else "The whole plan"))

    def action_copy(self) -> None:
        """Copies the command that makes the same run, and shows it in full."""
        question = self.desk.question
        name = self._default_name() if question.data is not None else None
        command = command_text(question, name)
        if not question.model or not command:
            self._app.tell("There is nothing to copy yet: m chooses a model")
            return
        self._copy(command)
        plan = "" if name is None else f"\n\nTo plan without training:\n\n{command_text(question)}"
        self._app.push_screen(Reading(f"{command}{plan}", title="The same in a shell"))

    @work(thread=True, exclusive=True, group="copy", exit_on_error=False)
    def _copy(self, text: str) -> None:
        from edgepeft_tui.clipboard import copy_text

        how = copy_text(self._app, text)
        self._app.call_from_thread(self._app.tell, f"The command was {how}")

    # Starting ----------------------------------------------------------------------------------------------------

    def _default_name(self) -> str:
        data = self.desk.question.data
        return self.adapter_name or as_name(Path(data).stem if data is not None else "adapter")

    def action_start(self) -> None:
        """Asks for the adapter's name, then trains the plan that is shown."""
        view, question = self.view, self.desk.question
        if not question.model or question.data is None:
            self._app.tell("A run needs a model and data: m and d choose them, b takes the demo's")
        elif self.refusal is not None:
            self._app.tell(self.refusal.text, severity="warning")
        elif view is None or not view.settled or self.desk.busy:
            self._app.tell("The plan is still being made: start when its line says so no more")
        else:
            self._ask_name(view.plan, self._default_name())

    def _ask_name(self, plan: TrainPlan, name: str) -> None:
        shelves = self._app.shelves
        running = tuple(row.key for row in shelves.runs if row.mark == "running") if shelves is not None else ()
        assert self.view is not None

        def named(answer: str | None) -> None:
            if answer is None:
                return
            try:
                check_name(answer, where="name")
            except EdgepeftError as error:
                self._app.tell_error(error)
                self._ask_name(plan, answer)
                return
            self.adapter_name = answer
            self._launch(plan, answer, sure=False)

        self._app.push_screen(Ask(started_question(self.view, running), name, title="Start"), named)

    @work(thread=True, exclusive=True, group="launch", exit_on_error=False)
    def _launch(self, plan: TrainPlan, name: str, sure: bool) -> None:
        from edgepeft.runs.launch import launch
        from edgepeft_tui.starting import doubt_now

        try:
            doubt = "" if sure else doubt_now(plan)
            if doubt:
                self.post_message(LaunchEnded(doubt=doubt, name=name))
                return
            self.post_message(LaunchEnded(run=launch(plan, name).id, name=name))
        except (EdgepeftError, OSError) as error:
            self.post_message(LaunchEnded(error=error, name=name))

    @on(LaunchEnded)
    async def _launch_ended(self, message: LaunchEnded) -> None:
        if message.run:
            self._app.tell(f"{message.run} is starting; it goes on when this window is closed")
            self._app.action_refresh_now()
            await self._app.go("train", run=message.run)
        elif message.error is not None:
            error = message.error
            text = str(error) if isinstance(error, EdgepeftError) else f"{type(error).__name__}: {error}"
            self._app.push_screen(
                Reading(f"{text}\n\nNothing was started, and the plan is as it was.", title="Not started")
            )
        else:
            answers = (("again", "Plan again"), ("start", "Start anyway"), ("cancel", "Cancel"))
            self._app.push_screen(
                Choice(message.doubt, answers, title="Less is free now", danger="start"),
                partial(self._doubted, message.name),
            )

    def _doubted(self, name: str, answer: str | None) -> None:
        if answer == "start" and self.view is not None:
            self._launch(self.view.plan, name, sure=True)
        elif answer == "again":
            self.action_replan()

    def action_replan(self) -> None:
        """Looks at the machine, the model and the data again, and plans anew."""
        self.planner.forget()
        self.desk.ask(self.desk.question, undoable=False)
