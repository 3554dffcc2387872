"""Questions that cover the screen until they are answered; escape answers None."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar

from rich.console import RenderableType
from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen
from textual.widgets import Button, Input, OptionList, Static
from textual.widgets.option_list import Option

from edgepeft_tui.text import visible, visible_lines

Answer = TypeVar("Answer")


class Framed(ModalScreen[Answer | None], Generic[Answer]):
    """A framed question; escape leaves it without an answer."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss_empty", "Cancel", id="dialog.cancel", tooltip="Leave everything as it is")
    ]

    def action_dismiss_empty(self) -> None:
        """Leaves without an answer."""
        self.dismiss(None)


class Dialog(Framed[str]):
    """One whose answer is a text."""


class Choice(Dialog):
    """Several answers, one key each; the first is the default."""

    def __init__(self, question: str, answers: Sequence[tuple[str, str]], *, title: str = "", danger: str = "") -> None:
        """Args: `answers` are (id, label); `danger` is the id of the one that loses something."""
        super().__init__()
        self._question, self._answers, self._title, self._danger = question, answers, title, danger

    def compose(self) -> ComposeResult:
        """The question above its buttons."""
        with Vertical(classes="dialog") as frame:
            frame.border_title = Text(visible(self._title)).markup
            yield Static(Text(visible_lines(self._question)), classes="question")
            with Horizontal(classes="buttons"):
                for name, label in self._answers:
                    button = Button(Text(label).markup, id=name)
                    button.variant = "error" if name == self._danger else "default"
                    yield button

    def on_mount(self) -> None:
        """The default has the focus."""
        self.query(Button).first().focus()

    @on(Button.Pressed)
    def _pressed(self, event: Button.Pressed) -> None:
        self.dismiss(event.button.id)

    def on_key(self, event: object) -> None:
        """Arrow keys move between the answers."""
        key = getattr(event, "key", "")
        if key in ("left", "up"):
            self.focus_previous()
        elif key in ("right", "down"):
            self.focus_next()


class Ask(Dialog):
    """One line of text."""

    def __init__(self, question: str, value: str = "", *, title: str = "", hint: str = "") -> None:
        super().__init__()
        self._question, self._value, self._title, self._hint = question, value, title, hint

    def compose(self) -> ComposeResult:
        """The question above its line."""
        with Vertical(classes="dialog") as frame:
            frame.border_title = Text(visible(self._title)).markup
            yield Static(Text(visible_lines(self._question)), classes="question")
            yield Input(self._value, placeholder=self._hint)
            yield Static(Text("enter takes it, escape leaves everything as it is"), classes="hint")

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        self.dismiss(event.value.strip())


class Pick(Dialog):
    """One of a list; answers its id."""

    def __init__(self, question: str, rows: Sequence[tuple[str, str]], *, title: str = "") -> None:
        """Args: `rows` are (id, line)."""
        super().__init__()
        self._question, self._rows, self._title = question, rows, title

    def compose(self) -> ComposeResult:
        """The question above its list."""
        with Vertical(classes="dialog tall") as frame:
            frame.border_title = Text(visible(self._title)).markup
            yield Static(Text(visible_lines(self._question)), classes="question")
            yield OptionList(*(Option(Text(visible(line))) for _, line in self._rows), markup=False)
            yield Static(Text("enter takes it, escape leaves everything as it is"), classes="hint")

    def on_mount(self) -> None:
        """The list has the focus."""
        self.query_one(OptionList).focus()

    @on(OptionList.OptionSelected)
    def _selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(self._rows[event.option_index][0])


class Reading(Dialog):
    """A text to read, such as a card; any of escape, enter and q leaves it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter,q", "dismiss_empty", "Close", id="dialog.close", show=False),
    ]

    def __init__(self, text: str | RenderableType, *, title: str = "") -> None:
        """Args: `text` may be drawn already; a plain one is never markup."""
        super().__init__()
        self._text, self._title = text, title

    def compose(self) -> ComposeResult:
        """The text in a frame that scrolls."""
        from textual.containers import VerticalScroll

        with VerticalScroll(classes="dialog reading") as frame:
            frame.border_title = Text(visible(self._title)).markup
            yield Static(Text(visible_lines(self._text)) if isinstance(self._text, str) else self._text)

    def on_mount(self) -> None:
        """The frame scrolls by keys."""
        self.query_one(".reading").focus()
