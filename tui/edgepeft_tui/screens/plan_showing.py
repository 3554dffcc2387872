"""How the Plan screen shows what is known."""

from __future__ import annotations

from rich.text import Text
from textual import events
from textual.widgets import Static

from edgepeft.units import format_bytes
from edgepeft_tui.choice_rows import bare_rows, overlaid
from edgepeft_tui.glyphs import glyphs
from edgepeft_tui.plan_text import command_text, data_text, memory_title, refusal_text, summary_text
from edgepeft_tui.screens.plan_actions import PlanActions
from edgepeft_tui.text import visible
from edgepeft_tui.widgets.choice_table import ChoiceTable
from edgepeft_tui.widgets.field import Field
from edgepeft_tui.widgets.ledger_bar import Ledger, LedgerBar
from edgepeft_tui.widgets.others_list import OthersList
from edgepeft_tui.widgets.sample_text import draw_lengths

FIRST_KEYS = (
    "m  choose a base model: of the store, found elsewhere on this disk, or by its path\n"
    "d  choose the data: a json, jsonl, csv, tsv or parquet file\n"
    "b  begin with the demo instead: its model, data and values are filled in, enter starts it"
)
"""What to do first."""
_NOTHING_FITS = "nothing fits as it is set: change a value or the model; u takes the last change back"


class PlanShowing(PlanActions):
    """Draws the question, the plan or the refusal, and what is being done; changes nothing."""

    _progress = ""

    def show_view(self) -> None:
        """A new plan: all of it."""
        self.show_question()
        self.show_memory()
        view = self.view
        if view is None:
            return
        self.query_one(OthersList).show_rows(
            view.others, "nothing else comes near" if view.settled else "comparing with other plans"
        )
        self.show_lengths()

    def show_question(self) -> None:
        """What is asked, over the choices of the plan that is there."""
        question = self.desk.question
        self.query_one("#model", Field).value = question.model
        self.query_one("#data", Field).value = question.data or ""
        intent = question.values.get("intent", "")
        rows = self.view.rows if self.view is not None else bare_rows() if question.model else ()
        shown = next((row.value for row in rows if row.what == "intent" and row.origin), "")
        self.query_one("#intent", Field).value = intent or shown
        rows, pending = overlaid(rows, question.values)
        self.query_one(ChoiceTable).show_rows(rows, pending)
        self.show_why()
        self.show_state()
        self.query_one("#command", Static).update(
            Text.assemble(("same  ", "dim"), visible(command_text(question))) if question.model else ""
        )

    def show_memory(self) -> None:
        """The bar and what it says: of the plan, or of the smallest one where nothing fits."""
        bar, summary, frame = self.query_one(LedgerBar), self.query_one("#summary", Static), self.query_one("#memory")
        refusal, view = self.refusal, self.view
        bar.legend_lines = 1 if self.size.height < 24 else 2
        memory = refusal.memory if refusal is not None else view.memory if view is not None else None
        budget = refusal.budget_bytes if refusal is not None else view.plan.spec.budget_bytes if view else None
        bar.ledger = None if memory is None else Ledger(memory.peak.bytes_by_category, budget, memory.uncertainty)
        title = "Memory" if memory is None else memory_title(memory)
        frame.border_title = title if refusal is None or refusal.fits else f"{title} {glyphs().dot} the smallest plan"
        frame.border_subtitle = f"budget {format_bytes(budget)}" if budget else ""
        if refusal is not None:
            summary.update(refusal_text(refusal, self.size.width))
        elif view is not None:
            summary.update(summary_text(view, wide=self.size.width >= 120))

    def show_state(self) -> None:
        """What is being worked on, else the data."""
        state, question = self.query_one("#state", Static), self.desk.question
        if self.desk.busy:
            doing = self._progress or "planning"
            cancel = f" {glyphs().dot} v cancels" if question.verify else ""
            known = f" {glyphs().dot} {data_text(self.view)}" if self.view is not None else ""
            state.update(Text(f"{visible(doing)} {glyphs().more}{cancel}{known}", style="italic"))
        elif self.view is not None and self.refusal is None:
            state.update(Text(visible(data_text(self.view))))
        elif self.refusal is not None and not self.refusal.fits:
            state.update(Text(_NOTHING_FITS, style="italic"))
        else:
            state.update("")
        notes = len(self.view.plan.notes) if self.view is not None else 0
        word = f"{notes} note{'s' if notes > 1 else ''} (n)" if notes else ""
        self.query_one("#choices").border_subtitle = word

    def show_why(self) -> None:
        """The highlighted row's reason in full."""
        row = self.query_one(ChoiceTable).row
        text = Text("")
        if row is not None:
            text = Text(visible(row.why if row.origin else row.help))
        self.query_one("#why", Static).update(text)

    def show_lengths(self) -> None:
        """The histogram, where there is room."""
        lengths = self.query_one("#lengths", Static)
        if self.view is not None and self.query_one("#spread").display:
            lengths.update(draw_lengths(self.view.bins, max(20, self.query_one("#spread").content_size.width)))

    def on_resize(self, event: events.Resize) -> None:
        """What depends on the width is drawn anew."""
        if self.is_mounted:
            self.call_after_refresh(self.show_lengths)
            self.show_memory()
