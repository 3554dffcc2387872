"""Dialogs of the Settings screen: a theme that is seen while one moves, and a key that is caught."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from rich.text import Text
from textual import events, on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static

from edgepeft_tui.keys import KeyWord
from edgepeft_tui.screens.dialogs import Pick
from edgepeft_tui.text import visible


class ThemePick(Pick):
    """A theme; the highlighted one is in force while the dialog is open, and escape brings the old one back."""

    def __init__(self, themes: Sequence[str], now: str) -> None:
        super().__init__("The highlighted one is shown at once.", [(name, name) for name in themes], title="Theme")
        self._themes, self._before = list(themes), now

    def on_mount(self) -> None:
        """The list begins at the theme in force."""
        super().on_mount()
        if self._before in self._themes:
            self.query_one(OptionList).highlighted = self._themes.index(self._before)

    @on(OptionList.OptionHighlighted)
    def _seen(self, event: OptionList.OptionHighlighted) -> None:
        self.app.theme = self._themes[event.option_index]

    def action_dismiss_empty(self) -> None:
        """Everything is as it was."""
        self.app.theme = self._before
        super().action_dismiss_empty()


class KeyCatch(ModalScreen[str | None]):
    """Takes the next key that is pressed; answers its name, an empty text for the default, or None."""

    CSS: ClassVar[str] = """
    KeyCatch { align: center middle; background: $background 60%; }
    KeyCatch .key { text-style: bold; margin: 1 0; }
    """

    def __init__(self, question: str, judge: Callable[[str], KeyWord]) -> None:
        """Args: `judge` says what is to be said of a key."""
        super().__init__()
        self._question, self._judge = question, judge
        self._key = ""

    def compose(self) -> ComposeResult:
        """The question, the key, what is to be said of it."""
        with Vertical(classes="dialog") as frame:
            frame.border_title = "New key"
            yield Static(Text(visible(self._question)))
            yield Static("press it", classes="key", markup=False)
            yield Static("", classes="word", markup=False)
            yield Static("enter keeps it, backspace goes back to the default, escape leaves it", classes="hint")

    def on_key(self, event: events.Key) -> None:
        """Every key comes here, and none goes further."""
        event.stop()
        event.prevent_default()
        if event.key == "escape":
            self.dismiss(None)
        elif event.key == "backspace":
            self.dismiss("")
        elif event.key != "enter":
            self._key = event.key
            word = self._judge(event.key)
            said = f"It cannot be had: {word.refusal}." if word.refusal else f"Note: {word.note}." if word.note else ""
            self.query_one(".key", Static).update(Text(visible(event.key)))
            self.query_one(".word", Static).update(Text(visible(said)))
        elif self._key and not self._judge(self._key).refusal:
            self.dismiss(self._key)
