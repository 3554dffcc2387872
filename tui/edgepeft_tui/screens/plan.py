"""Plan: what fits, what it costs and why; every value can be changed, and the memory bar moves while it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import msgspec
from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.widgets import OptionList, Static

from edgepeft.errors import EdgepeftError
from edgepeft_tui.actions import bindings
from edgepeft_tui.choice_rows import ChoiceRow, has_words, settable, words_for
from edgepeft_tui.plan_desk import Desk
from edgepeft_tui.plan_messages import (
    DemoFound,
    Glanced,
    ModelsFound,
    PlanIdle,
    Planned,
    PlanProgress,
    PlanRefused,
    WordsFound,
)
from edgepeft_tui.plan_text import (
    glance_text,
    trial_text,
)
from edgepeft_tui.plans import Planner, PlanView, Question, Refusal
from edgepeft_tui.screens.plan_dialogs import EditValue
from edgepeft_tui.screens.plan_showing import FIRST_KEYS, PlanShowing
from edgepeft_tui.widgets.choice_table import ChoiceTable
from edgepeft_tui.widgets.field import Field
from edgepeft_tui.widgets.ledger_bar import Ledger, LedgerBar
from edgepeft_tui.widgets.others_list import OthersList


class PlanScreen(PlanShowing):
    """Shows the plan for what is asked; the desk has the questions, this the answers."""

    AREA = "plan"
    CSS_PATH = "plan.tcss"
    BINDINGS: ClassVar[list[BindingType]] = bindings("plan")
    HELP = (
        "Plan finds a run that fits. Every line of the table is a choice with its origin and reason: enter changes it, "
        "backspace gives it back to the planner, u takes the last change back. The bar shows the memory at the peak "
        "by category against the budget; + is what it may be off. o goes to the other plans that fit, v runs the step "
        "without values to check the prediction, n tells everything that is known, ctrl+s starts."
    )

    def __init__(self) -> None:
        super().__init__()
        self.planner = Planner()
        self.desk = Desk(self.planner, self.post_message, lambda: self._plan(), self._glance_at)
        self.view: PlanView | None = None
        self.refusal: Refusal | None = None
        self.adapter_name = ""
        self._planned_for: tuple[str, str | None] = ("", None)
        """Model and data of the plan that is shown."""
        self._progress = ""

    def content(self) -> ComposeResult:
        """What is asked, memory, choices and others, the command."""
        with Horizontal(id="ask"):
            yield Field("Model", id="model", empty="choose (m)")
            yield Field("Data", id="data", empty="choose (d)")
            yield Field("Intent", id="intent", empty="balanced")
            yield Field("Start", id="start")
        yield Static("", id="state", markup=False)
        with Vertical(id="memory", classes="frame"):
            yield LedgerBar(id="bar")
            yield Static(Text(FIRST_KEYS), id="summary", markup=False)
        with Vertical(id="work"):
            with Vertical(id="choices", classes="frame"):
                yield ChoiceTable(id="table")
                yield Static("", id="why", markup=False)
            with Vertical(id="side"):
                yield OthersList(id="others", classes="frame")
                with Vertical(id="spread", classes="frame"):
                    yield Static("", id="lengths", markup=False)
        yield Static("", id="command", markup=False)

    def on_mount(self) -> None:
        """Names the frames, and begins with a model that is here."""
        for frame, title in (("memory", "Memory"), ("choices", "Choices (t)"), ("others", "Others that fit (o)")):
            self.query_one(f"#{frame}").border_title = title
        self.query_one("#spread").border_title = "Samples by length in tokens"
        self.query_one("#table").focus()
        self._find_models()

    def show(self, **what: Any) -> None:
        """Plans for `model` and `data`; `demo` fills in the demo's; `scan` looks for models on this disk."""
        if what.get("demo"):
            self._find_demo()
            return
        question = self.desk.question
        if what.get("model") is not None and what["model"] != question.model:
            question = msgspec.structs.replace(question, model=what["model"], verify=False)
        if what.get("data") is not None:
            question = msgspec.structs.replace(question, data=str(what["data"]), verify=False)
        if question != self.desk.question:
            self.change(question)
        if what.get("scan"):
            self.action_choose_model(scan=True)

    # What is asked -----------------------------------------------------------------------------------------------

    def change(self, question: Question, *, undoable: bool = True) -> None:
        """Asks, and shows at once what can be said at once."""
        if not question.model:
            # Such as data that was chosen first: there is nothing to plan yet.
            self.desk.question = question
            self.show_question()
            return
        busy = self.desk.busy
        self.desk.ask(question, undoable=undoable)
        if busy:
            # The planner's own thread has something else to end first.
            self._glance("", "", question)
        self.show_question()

    @property
    def view_values(self) -> dict[str, str]:
        """What the user had set in the plan that is shown."""
        return self.desk.good.values if self.desk.good is not None else {}

    def set_value(self, what: str, text: str) -> None:
        """Sets one value, or gives it back to the planner where the text is empty."""
        question = self.desk.question
        values = {name: value for name, value in question.values.items() if name != what}
        if text:
            values[what] = text
        if what == "method":
            kept = settable(text or "lora")
            dropped = sorted(set(values) - kept)
            values = {name: value for name, value in values.items() if name in kept}
            if dropped:
                self._app.tell(f"{text or 'lora'} has no {', '.join(dropped)}: given up with the other method")
        if values != question.values:
            self.change(msgspec.structs.replace(question, values=values, verify=False))

    def open_editor(self, row: ChoiceRow) -> None:
        """Edits a row below the bar."""
        if not row.editable:
            self._app.tell(f"{row.what} follows from the rest")
        elif has_words(row):
            self._find_words(row)
        else:
            self._edit(row, ())

    def _edit(self, row: ChoiceRow, words: tuple[tuple[str, str], ...]) -> None:
        def tried(text: str) -> None:
            values = {name: value for name, value in self.desk.question.values.items() if name != row.what}
            question = self.desk.question
            if text:
                values[row.what] = text
            self._glance(row.what, text, msgspec.structs.replace(question, values=values))

        def taken(text: str | None) -> None:
            if text is None:
                self.show_memory()
            else:
                self.set_value(row.what, text)

        self._app.push_screen(EditValue(row, words, tried), taken)

    # Work in threads ---------------------------------------------------------------------------------------------

    @work(thread=True, group="plan", exit_on_error=False)
    def _plan(self) -> None:
        self.desk.work()

    @work(thread=True, exclusive=True, group="glance", exit_on_error=False)
    def _glance(self, what: str, text: str, question: Question) -> None:
        self._glance_at(question, what, text)

    def _glance_at(self, question: Question, what: str = "", text: str = "") -> None:
        """In a thread: tells what a changed value makes of the memory, before there is a plan for it."""
        view = self.view
        if view is not None and self._planned_for == (question.model, question.data):
            self.post_message(Glanced(what, text, self.planner.glance(question, view.plan.spec)))

    @work(thread=True, exclusive=True, group="words", exit_on_error=False)
    def _find_words(self, row: ChoiceRow) -> None:
        self._read(lambda: WordsFound(row, words_for(row)))

    @work(thread=True, exclusive=True, group="models", exit_on_error=False)
    def _find_models(self) -> None:
        from edgepeft_tui import finds

        self._read(lambda: ModelsFound(finds.store_models()))

    @work(thread=True, exclusive=True, group="demo", exit_on_error=False)
    def _find_demo(self) -> None:
        from edgepeft_tui import finds

        self._read(lambda: DemoFound(finds.demo_choice()))

    def _read(self, make: Callable[[], Message]) -> None:
        """In a thread: tells what was found, or why it was not."""
        try:
            self.post_message(make())
        except (EdgepeftError, OSError) as error:
            self._app.call_from_thread(self._app.tell_error, error)

    # What comes back ---------------------------------------------------------------------------------------------

    @on(Planned)
    def _planned(self, message: Planned) -> None:
        if msgspec.structs.replace(message.question, verify=False) != msgspec.structs.replace(
            self.desk.question, verify=False
        ):
            return
        self.desk.accept(message.question)
        self.view, self.refusal = message.view, None
        self._planned_for = message.question.model, message.question.data
        self.show_view()

    @on(PlanRefused)
    def _refused(self, message: PlanRefused) -> None:
        if message.question != self.desk.question:
            return
        if message.refusal.fits and self.desk.give_up():
            # A value that cannot be meant changes nothing.
            self._app.tell(message.refusal.text, severity="warning", seconds=10)
            self.show_question()
            self.show_memory()
            return
        if not message.refusal.fits:
            self.desk.accept(message.question)
            if self._planned_for != (message.question.model, message.question.data):
                # The choices on the screen are those of another model or other data.
                self.view = None
        self.refusal = message.refusal
        self.query_one(OthersList).show_rows((), "nothing fits" if not message.refusal.fits else "no plan yet")
        self.show_question()
        self.show_memory()

    @on(PlanProgress)
    def _progressed(self, message: PlanProgress) -> None:
        share = "" if message.share is None else f" {100 * message.share:3.0f} %"
        self._progress = f"{message.what}{share}"
        self.show_state()

    @on(PlanIdle)
    def _idle(self) -> None:
        self.desk.rest()
        self._progress = ""
        self.show_state()

    @on(Glanced)
    def _glanced(self, message: Glanced) -> None:
        glance, memory = message.glance, message.glance.memory
        trying = isinstance(self._app.screen, EditValue)
        if isinstance(self._app.screen, EditValue):
            self._app.screen.show_effect(glance_text(glance))
        elif self.desk.question.values == self.view_values:
            return  # the plan itself came first
        if memory is not None:
            self.query_one(LedgerBar).ledger = Ledger(
                memory.peak.bytes_by_category, glance.budget_bytes, memory.uncertainty
            )
            if trying and self.view is not None:
                self.query_one("#summary", Static).update(trial_text(self.view, message.what, message.text, glance))

    @on(WordsFound)
    def _words_found(self, message: WordsFound) -> None:
        self._edit(message.row, message.words)

    @on(ModelsFound)
    def _models_found(self, message: ModelsFound) -> None:
        here = [model for model in message.models if model.usable]
        if here and not self.desk.question.model and not here[0].note.startswith("comes with"):
            self.change(msgspec.structs.replace(self.desk.question, model=here[0].key))
        self.show_question()

    @on(DemoFound)
    def _demo_found(self, message: DemoFound) -> None:
        demo = message.demo
        self.adapter_name = demo.name
        self.change(Question(demo.model, demo.data, demo.values))
        self.query_one("#start").focus()

    @on(OptionList.OptionHighlighted, "#table")
    def _row_highlighted(self) -> None:
        self.show_why()

    @on(OptionList.OptionSelected, "#table")
    def _row_selected(self) -> None:
        self.action_edit()

    @on(OptionList.OptionSelected, "#others")
    def _other_selected(self) -> None:
        row = self.query_one(OthersList).row
        if row is not None:
            self.take_other(row)

    @on(Field.Pressed)
    def _field_pressed(self, message: Field.Pressed) -> None:
        name = str(message.field.id)
        if name == "model":
            self.action_choose_model()
        elif name == "data":
            self.action_choose_data()
        elif name == "intent":
            self.action_edit("intent")
        else:
            self.action_start()
