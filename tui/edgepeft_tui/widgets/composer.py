"""Where a question is written: enter sends it, another key begins a new line."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import TextArea

_NOT_OURS = {"f6", "f7", "ctrl+f"}
"""Keys of TextArea that mean something else on every screen of this program."""


def _editing_keys() -> list[BindingType]:
    kept: list[BindingType] = []
    for binding in TextArea.BINDINGS:
        assert isinstance(binding, Binding)
        keys = [key for key in binding.key.split(",") if key not in _NOT_OURS]
        if keys:
            kept.append(replace(binding, key=",".join(keys), show=False))
    return kept


class Composer(TextArea, inherit_bindings=False):
    """Lines of text that grow with what is written. Sending is the screen's key."""

    BINDINGS: ClassVar[list[BindingType]] = _editing_keys()
    HELP = (
        "Write here. Enter sends; ctrl+t begins a new line (alt+enter too, where the terminal tells it from enter). "
        "Up in an empty field brings the last question back to change it. What you write while an answer comes stays."
    )

    class Recalled(Message):
        """The last question is wanted back."""

    def __init__(self) -> None:
        super().__init__(id="composer", classes="frame", compact=True, highlight_cursor_line=False)
        self.placeholder = "Write a message; enter sends, ctrl+t begins a new line"

    def action_cursor_up(self, select: bool = False) -> None:
        """In an empty field, brings the last question back."""
        if self.text or select:
            super().action_cursor_up(select)
        else:
            self.post_message(self.Recalled())
