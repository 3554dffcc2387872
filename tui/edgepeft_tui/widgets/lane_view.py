"""One lane of the chat: questions and answers, newest at the bottom, in a frame that says who answers."""

from __future__ import annotations

from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Static

from edgepeft_tui.chat.choices import BASE
from edgepeft_tui.chat.lane import Lane
from edgepeft_tui.glyphs import glyphs
from edgepeft_tui.text import LONGEST, visible, visible_lines
from edgepeft_tui.widgets.answer import AnswerView

MOST_DRAWN = 60
"""Questions and answers that are drawn; older ones are in the conversation still."""


class Question(Static):
    """What was asked."""

    def __init__(self, text: str) -> None:
        shown = visible_lines(text[:LONGEST]) + (glyphs().more if len(text) > LONGEST else "")
        super().__init__(Text.assemble((f"{glyphs().prompt} ", "bold"), shown), classes="asked")


class LaneView(VerticalScroll):
    """Draws a lane; the screen tells it what happens."""

    HELP = (
        "Questions and answers. Up and down scroll. e changes the last question, r answers it again, c copies the "
        "answer, b a block of its code, w writes the conversation to a file, n begins a new one, m chooses a base, "
        "s the system message, p how the base is held. Tab goes to the field below."
    )

    class Chosen(Message):
        """This lane got the focus."""

        def __init__(self, lane: Lane) -> None:
            super().__init__()
            self.lane = lane

    def __init__(self, lane: Lane, *, beside: bool = False) -> None:
        """Args: `beside` says that there are others, and that the frame's title tells them apart."""
        super().__init__(classes="frame lane", id=f"lane-{lane.number}")
        self.lane = lane
        self._beside = beside
        self._captioned = _caption(lane.uses) if beside and not lane.conversation.turns else None
        """Who was named last above an answer."""

    def compose(self) -> ComposeResult:
        """What the conversation holds already."""
        turns = self.lane.conversation.turns
        if not turns:
            yield Static(Text(_FIRST_WORDS_BESIDE if self._beside else _FIRST_WORDS), classes="empty")
        if len(turns) > MOST_DRAWN:
            yield Static(Text(f"{len(turns) - MOST_DRAWN} earlier turns are not drawn"), classes="note")
        for turn in turns[-MOST_DRAWN:]:
            if turn.role == "user":
                yield Question(turn.content)
            else:
                yield AnswerView(self._caption(turn.adapters), turn.content)

    def on_mount(self) -> None:
        """Looks at each change of height whether there is more than the frame shows."""
        self.watch(self, "virtual_size", self._height_changed)

    def show_state(self, title: str, subtitle: str) -> None:
        """What the frame says."""
        self.border_title = Text(visible(title)).markup
        self.border_subtitle = Text(visible(subtitle)).markup

    async def show_question(self, text: str, *, instead: bool) -> None:
        """A question comes, `instead` of the last one where that is so."""
        await self.query(".empty").remove()
        if instead:
            await self._drop(after_question=False)
        await self.mount(Question(text))
        drawn = [child for child in self.children if isinstance(child, Question)]
        if len(self.children) > MOST_DRAWN and len(drawn) > 1:
            # An exchange goes whole.
            await self.remove_children(self.children[: self.children.index(drawn[1])])
        self.scroll_end(animate=False)

    async def begin_answer(self) -> None:
        """An answer comes; an earlier one to the same question goes."""
        if len(self.query(Question)):
            await self._drop(after_question=True)
        await self.mount(AnswerView(self._caption(self.lane.answered_by)))

    async def grow(self) -> None:
        """Draws what came since the last time."""
        text = self.lane.take_unread()
        answer = self._last_answer()
        if text and answer is not None:
            await answer.grow(text)

    async def end_answer(self, note: str, trouble: bool) -> None:
        """The answer is complete, or it failed."""
        await self.grow()
        answer = self._last_answer()
        if answer is not None:
            await answer.end(note, trouble=trouble)

    def on_focus(self, event: events.Focus) -> None:
        """Keys act on this lane now."""
        self.post_message(self.Chosen(self.lane))

    def on_click(self) -> None:
        """So does a click."""
        self.focus()

    def _last_answer(self) -> AnswerView | None:
        # A query would walk through every block of every answer, ten times a second.
        last = self.children[-1] if self.children else None
        return last if isinstance(last, AnswerView) else None

    def _height_changed(self) -> None:
        # In the middle of a layout nothing may scroll.
        self.call_later(self._follow)

    def _follow(self) -> None:
        """Follows what is new, until someone scrolls up; what is shorter than the frame stays at its top."""
        if not self.is_anchored and self.virtual_size.height > self.scrollable_content_region.height:
            self.anchor()

    def _caption(self, adapters: tuple[str, ...]) -> str:
        """Names who answers where that is another than before."""
        label = _caption(adapters)
        if label == self._captioned:
            return ""
        self._captioned = label
        return label

    async def _drop(self, *, after_question: bool) -> None:
        asked: Widget = self.query(Question).last()
        at = self.children.index(asked) + (1 if after_question else 0)
        if any(child.query(".caption") for child in self.children[at:]):
            self._captioned = None
        await self.remove_children(self.children[at:])


def _caption(adapters: tuple[str, ...]) -> str:
    return " + ".join(adapters) or BASE


_FIRST_WORDS = (
    "Write below; enter sends.\n\n"
    "ctrl+n  the next adapter answers, in the middle of a conversation too\n"
    "ctrl+l  the base alone answers\n"
    "ctrl+o  the same question to several, side by side\n"
    "F8 F9   the adapter weaker or stronger\n"
    "tab     to the answers: e edit, r again, c copy, b copy code, m model"
)
_FIRST_WORDS_BESIDE = "Each question goes to every lane in turn.\n\nctrl+o goes on with the current lane alone."
