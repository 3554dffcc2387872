"""Chat: a conversation with a base and its adapters, swapped in its middle, or several side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal

from edgepeft_tui.actions import bindings
from edgepeft_tui.chat.choices import BASE, read_start
from edgepeft_tui.chat.talk import Asked, Began, Ended, Grew, LanesChanged, Talk, TalkChanged, Told
from edgepeft_tui.messages import ShelvesRead
from edgepeft_tui.screens.chat_deeds import ChatDeeds
from edgepeft_tui.widgets.chat_line import ChatLine, figures_of
from edgepeft_tui.widgets.composer import Composer
from edgepeft_tui.widgets.lane_view import LaneView


class ChatScreen(ChatDeeds):
    """Draws the talk and passes on what is wanted of it."""

    AREA = "chat"
    CSS_PATH = "chat.tcss"
    BINDINGS: ClassVar[list[BindingType]] = bindings("chat")
    HELP = (
        "Enter sends; ctrl+t begins a new line. ctrl+n answers with the next adapter, ctrl+l with the base alone, "
        "ctrl+f chooses adapters and strengths, F8 and F9 change the strength by 0.1, ctrl+o puts each question to "
        "several adapters side by side. Escape stops an answer. Up in the empty field, or e among the answers, changes "
        "the last question. Tab goes to the answers, where r answers again, c copies the answer, b its code, w writes "
        "a file. ctrl+s shows the conversations that are kept, F10 the sampling."
    )

    def __init__(self) -> None:
        super().__init__()
        self.talk = Talk(self.post_message)
        self._asked_for = False
        """Whether something else was shown than what the chat opens with."""
        self._adapters_seen: Sequence[object] | None = None

    def content(self) -> ComposeResult:
        """Who answers, the lanes, and where one writes."""
        yield ChatLine(id="chat-line")
        with Horizontal(id="lanes"):
            for lane in self.talk.lanes:
                yield LaneView(lane)
        yield Composer()

    def on_mount(self) -> None:
        """Looks for what to begin with; nothing is started yet."""
        self.query_one(Composer).focus()
        self._draw_state()
        self.choose(self._begin())

    async def on_unmount(self) -> None:
        """Nothing outlives the screen."""
        await self.talk.close()

    def show(self, **what: Any) -> None:
        """Chats with `adapter=REFERENCE`, compares `adapters=[…]` (`base` is the base alone), or takes `model=NAME`."""
        adapters: list[str] | None = what.get("adapters")
        adapter, model = what.get("adapter"), what.get("model")
        if not (adapter or adapters or model):
            return
        if self.talk.busy:
            self._app.tell("An answer runs; escape stops it, then choose again", severity="warning")
            return
        self._asked_for = True
        lanes: list[list[str]]
        if adapters:
            named = adapters if len(adapters) > 1 else [BASE, *adapters]
            lanes = [[] if name == BASE else [name] for name in named]
        else:
            lanes = [[adapter]] if adapter else [[]]
        self.choose(self.open_and_load(model, lanes))

    async def _begin(self) -> None:
        start = await asyncio.to_thread(read_start)
        if self._asked_for:
            return
        self.talk.start = start
        if start.at_hand:
            await self.talk.open(start.model, [start.adapters])
        self.post_message(TalkChanged())

    # What the talk tells.

    @on(TalkChanged)
    def _talk_changed(self) -> None:
        self._draw_state()

    @on(LanesChanged)
    async def _lanes_changed(self) -> None:
        place = self.query_one("#lanes")
        self.set_class(len(self.talk.lanes) > 2, "-three")
        with self.app.batch_update():
            await place.remove_children()
            await place.mount_all([LaneView(lane, beside=self.talk.comparing) for lane in self.talk.lanes])
        self._draw_state()

    @on(Asked)
    async def _question_asked(self, message: Asked) -> None:
        for view in self._views(message.lane.number):
            await view.show_question(message.text, instead=message.instead)

    @on(Began)
    async def _answer_began(self, message: Began) -> None:
        for view in self._views(message.lane.number):
            await view.begin_answer()

    @on(Grew)
    async def _answer_grew(self, message: Grew) -> None:
        for view in self._views(message.lane.number):
            await view.grow()

    @on(Ended)
    async def _answer_ended(self, message: Ended) -> None:
        for view in self._views(message.lane.number):
            await view.end_answer(message.note, message.trouble)

    @on(Told)
    def _told(self, message: Told) -> None:
        self._app.tell(message.text, severity=message.severity, seconds=10)

    @on(ShelvesRead)
    def _shelves_read(self, message: ShelvesRead) -> None:
        if message.shelves.adapters != self._adapters_seen:
            self._adapters_seen = message.shelves.adapters
            self.run_worker(self.quietly(self.talk.refresh_fitting()), group="fitting", exclusive=True)

    # What the widgets tell.

    @on(LaneView.Chosen)
    def _lane_chosen(self, message: LaneView.Chosen) -> None:
        if message.lane in self.talk.lanes:
            self.talk.current = self.talk.lanes.index(message.lane)
            self._draw_state()

    @on(ChatLine.Clicked)
    async def _line_clicked(self, message: ChatLine.Clicked) -> None:
        await self.run_action("choose_model" if message.part == "model" else "choose_adapters")

    @on(Composer.Recalled)
    def _recalled(self) -> None:
        self.action_edit_last()

    def _views(self, number: int) -> list[LaneView]:
        return [view for view in self._all_views() if view.lane.number == number]

    def _all_views(self) -> list[LaneView]:
        return [child for child in self.query_one("#lanes").children if isinstance(child, LaneView)]

    def _draw_state(self) -> None:
        self.query_one(ChatLine).read(self.talk)
        setup = self.talk.setup
        context = setup.entry.shape.context_length if setup is not None else None
        for view in self._all_views():
            comparing = self.talk.comparing
            figures = [figures_of(view.lane, context, short=True)] if comparing else []
            view.show_state(view.lane.label, "  ".join([*([view.lane.doing] if view.lane.doing else []), *figures]))
            view.set_class(comparing and view.lane is self.talk.lane, "-current")
        composer = self.query_one(Composer)
        words = "escape stops the answer" if self.talk.busy else ""
        composer.border_subtitle = words
        composer.border_title = "Changing the last question; escape leaves it" if self.editing else ""
