"""A dialog of several fields. What is wrong with them is said in it, so that nothing typed is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import msgspec
from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Static

from edgepeft.errors import EdgepeftError
from edgepeft_tui.text import visible, visible_lines
from edgepeft_tui.widgets.cycle import Cycle

Values = dict[str, str]
"""What the fields hold, by their ids."""


class Field(msgspec.Struct, frozen=True):
    """One line of a form."""

    id: str
    label: str
    value: str = ""
    words: tuple[tuple[str, str], ...] = ()
    """Where it is one of a few: each with what it means. Else it is a line of text."""
    hint: str = ""
    """Shown in an empty line of text."""
    only: tuple[str, tuple[str, ...]] | None = None
    """Another field, and the words of it with which this one counts."""


class Form(ModalScreen[Values | None]):
    """Answers the values of the fields that count, or None."""

    CSS_PATH = "form.tcss"
    HELP = "Up, down and tab move between the fields, left and right choose a word. Enter starts, escape leaves."
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss_empty", "Cancel", id="form.cancel", tooltip="Leave everything as it is"),
        Binding("enter", "take", "Take it", id="form.take", tooltip="Start with what the fields hold"),
        Binding("f1", "app.show_help", "Help", id="form.help", tooltip="Say what the focused part is"),
        Binding("down", "app.focus_next", "Next", id="form.next", show=False),
        Binding("up", "app.focus_previous", "Previous", id="form.previous", show=False),
    ]

    def __init__(
        self,
        fields: Sequence[Field],
        *,
        title: str,
        question: str = "",
        take: str = "Start",
        check: Callable[[Values], None] | None = None,
    ) -> None:
        """Args: `check` raises an `EdgepeftError` for what cannot be meant; it has to be quick."""
        super().__init__()
        self._fields = tuple(fields)
        self._title, self._question, self._take, self._check = title, question, take, check

    def compose(self) -> ComposeResult:
        """The question, the fields, what is wrong, the buttons."""
        with Vertical(classes="dialog form") as frame:
            frame.border_title = Text(visible(self._title)).markup
            if self._question:
                yield Static(Text(visible_lines(self._question)), classes="question")
            with VerticalScroll(can_focus=False, classes="fields"):
                for field in self._fields:
                    with Horizontal(id=f"row-{field.id}", classes="field"):
                        yield Static(Text(visible(field.label)), classes="label")
                        if field.words:
                            yield Cycle(field.words, field.value, id=field.id)
                        else:
                            yield Input(field.value, placeholder=field.hint, id=field.id, compact=True)
            yield Static("", classes="wrong", markup=False)
            with Horizontal(classes="buttons"):
                yield Button(Text(self._take).markup, id="take", compact=True, variant="primary")
                yield Button("Cancel", id="cancel", compact=True)

    def on_mount(self) -> None:
        """The first field has the focus."""
        self._show_what_counts()
        self.query_one(f"#{self._fields[0].id}").focus()

    @property
    def values(self) -> Values:
        """What the fields that count hold."""
        found: Values = {}
        for field in self._fields:
            widget = self.query_one(f"#{field.id}")
            assert isinstance(widget, Cycle | Input)
            # A field counts after the one that it depends on.
            if field.only is None or found.get(field.only[0]) in field.only[1]:
                found[field.id] = widget.value.strip()
        return found

    @on(Cycle.Changed)
    def _show_what_counts(self) -> None:
        counting = self.values
        for field in self._fields:
            self.query_one(f"#row-{field.id}").display = field.id in counting
        self._say("")

    @on(Input.Changed)
    def _typed(self) -> None:
        self._say("")

    @on(Input.Submitted)
    def _submitted(self) -> None:
        self.action_take()

    @on(Button.Pressed)
    def _pressed(self, event: Button.Pressed) -> None:
        if event.button.id == "take":
            self.action_take()
        else:
            self.dismiss(None)

    def action_take(self) -> None:
        """Answers the values, or says what is wrong with them."""
        values = self.values
        try:
            if self._check is not None:
                self._check(values)
        except EdgepeftError as error:
            self._say(str(error))
            return
        self.dismiss(values)

    def action_dismiss_empty(self) -> None:
        """Leaves without an answer."""
        self.dismiss(None)

    def _say(self, wrong: str) -> None:
        place = self.query_one(".wrong", Static)
        place.update(Text(visible(wrong)))
        place.display = bool(wrong)
