"""The chat itself, without widgets: lanes, the process that answers, and messages on what happens.

Every coroutine here runs in the UI's loop and never blocks it; what may take a while goes into a thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textual.message import Message

from edgepeft.chat.client import InferenceClient
from edgepeft.chat.conversation import Conversation
from edgepeft.chat.detokenize import TextStream
from edgepeft.chat.protocol import Answer, Sampling
from edgepeft.chat.setup import ChosenAdapter, Setup, encode_conversation
from edgepeft.errors import EdgepeftError
from edgepeft.library.store import AdapterFolder
from edgepeft_tui.chat.choices import Prepared, Start, adopt, prepare, read_fitting
from edgepeft_tui.chat.lane import Lane
from edgepeft_tui.chat.session import Session

_DRAW_SECONDS = 0.1
"""Between two looks at an answer that comes."""


@dataclass
class TalkChanged(Message):
    """Base, adapters, loading or figures changed."""

    def can_replace(self, message: Message) -> bool:
        """The state is read when it is drawn."""
        return isinstance(message, TalkChanged)


@dataclass
class LanesChanged(Message):
    """There are other lanes, or another conversation in them."""


@dataclass
class Asked(Message):
    """A question was put to a lane; `instead` of its last exchange where that is true."""

    lane: Lane
    text: str
    instead: bool


@dataclass
class Began(Message):
    """A lane's answer begins; an earlier one to the same question goes."""

    lane: Lane


@dataclass
class Grew(Message):
    """There is unread text in a lane."""

    lane: Lane

    def can_replace(self, message: Message) -> bool:
        """All unread text is taken at once."""
        return isinstance(message, Grew) and message.lane is self.lane


@dataclass
class Ended(Message):
    """A lane's answer ended."""

    lane: Lane
    note: str = ""
    trouble: bool = False


@dataclass
class Told(Message):
    """Something a person should know."""

    text: str
    severity: str = "warning"


class Talk:
    """State and deeds of the chat.

    Args:
        post: takes messages, from any thread.
    """

    def __init__(self, post: Callable[[Message], Any]) -> None:
        self._post = post
        self._session = Session()
        self._choosing = asyncio.Lock()
        self._task: asyncio.Task[Any] | None = None
        self.start = Start("")
        self.setup: Setup | None = None
        self.precision: str | None = None
        """As the user said it; None for what the adapter was trained on."""
        self.sampling: Sampling | None = None
        """As the user set it; None for what the model's authors advise."""
        self.advised = Sampling()
        self.fitting: tuple[AdapterFolder, ...] = ()
        self.lanes = [Lane()]
        self.current = 0
        self.loading = ""
        """What is being loaded; empty while nothing is."""
        self.busy = False
        """Whether an answer is waited for."""

    @property
    def lane(self) -> Lane:
        """The lane that keys act on."""
        return self.lanes[self.current]

    @property
    def comparing(self) -> bool:
        """Whether several lanes get each question."""
        return len(self.lanes) > 1

    # What is chatted with.

    async def open(
        self, model: str | None, lanes: Sequence[Sequence[str | ChosenAdapter]], *, keep: bool = False
    ) -> None:
        """Takes a base and one or more lanes.

        Args:
            keep: go on with the conversation of the current lane, in every lane.

        Raises:
            EdgepeftError: one of them cannot be used; nothing has changed then.
        """
        async with self._choosing:
            try:
                prepared = await asyncio.to_thread(prepare, model, lanes, self.precision, self._progress)
            finally:
                self.loading = ""
                self._post(TalkChanged())
            self._begin_with(prepared, keep)

    def _begin_with(self, prepared: Prepared, keep: bool) -> None:
        before, was = self.lane, self.setup
        keep = keep and was is not None and was.entry.fingerprint == prepared.setup.entry.fingerprint
        self._take(prepared)
        made = [Lane(*pair) for pair in zip(prepared.lanes, prepared.promptings, strict=True)]
        for index, lane in enumerate(made if keep else ()):
            lane.conversation.turns = list(before.conversation.turns)
            lane.own_system = before.own_system
            lane.path = before.path if index == 0 else None
            lane.context_tokens = before.context_tokens
            if before.own_system:
                lane.conversation.system = before.conversation.system
        self.lanes, self.current = made, 0
        self._tell([*prepared.setup.warnings, *made[0].prompting.warnings] if made[0].prompting else [])
        self._post(LanesChanged())

    def _take(self, prepared: Prepared) -> None:
        self.setup, self.advised, self.fitting = prepared.setup, prepared.advised, prepared.fitting
        self.loading = ""

    async def adopt(self, chosen: tuple[ChosenAdapter, ...]) -> None:
        """Other adapters answer in the current lane from now on; the conversation goes on.

        Raises:
            EdgepeftError: one of them cannot be used; nothing has changed then.
        """
        setup, lane = await self._setup(), self.lane
        prompting, warnings = await asyncio.to_thread(adopt, setup, chosen)
        lane.adopt(chosen, prompting)
        self._tell(warnings)
        self._post(TalkChanged())

    async def refresh_fitting(self) -> None:
        """Looks for adapters of this base that were made meanwhile."""
        if self.setup is not None:
            self.fitting = await asyncio.to_thread(read_fitting, self.setup.entry)

    async def load(self) -> None:
        """Starts the process, so that the first answer does not wait for it.

        Raises:
            EdgepeftError: the base cannot be loaded.
        """
        await self._client()

    def go_on_alone(self) -> None:
        """Leaves comparing; the current lane stays."""
        self.lanes, self.current = [self.lane], 0
        self._post(LanesChanged())

    def begin_anew(self, conversation: Conversation | None = None, path: Path | None = None) -> None:
        """An empty conversation, or a kept one, in the current lane alone."""
        lane = self.lane
        self.lanes, self.current = [Lane(lane.chosen, lane.prompting, conversation, path)], 0
        if conversation is not None:
            self.lane.own_system = True
        self._post(LanesChanged())

    async def count(self) -> None:
        """How full the context is, after a conversation was taken up.

        Raises:
            EdgepeftError: the chat template refuses it.
        """
        lane = self.lane
        if lane.prompting is not None and lane.conversation.turns:
            ids = await asyncio.to_thread(encode_conversation, lane.conversation.messages(), lane.prompting)
            lane.context_tokens = len(ids)
            self._post(TalkChanged())

    # Asking and answering.

    async def ask(self, text: str, *, instead: bool = False) -> None:
        """Puts a question to every lane, `instead` of the last one where that is wanted, and waits for the answers."""
        self.busy = True
        async with self._choosing:
            # What is being chosen answers already.
            pass
        for lane in self.lanes:
            if instead:
                lane.conversation.take_back_answer()
            replaced = bool(lane.conversation.turns) and lane.conversation.turns[-1].role == "user"
            lane.conversation.take_back()
            lane.conversation.ask(text)
            self._post(Asked(lane, text, instead=replaced))
            await self._keep(lane)
        await self.answer(self.lanes)

    async def answer_again(self) -> None:
        """Another answer to the last question in the current lane."""
        self.lane.conversation.take_back_answer()
        await self.answer([self.lane])

    async def answer(self, lanes: Sequence[Lane]) -> None:
        """Answers the question that waits in each lane, one lane after the other."""
        self.busy = True
        for lane in lanes:
            lane.doing = "waits for its turn"
        self._post(TalkChanged())
        try:
            for lane in lanes:
                self._task = asyncio.create_task(self._answer(lane))
                try:
                    go_on = await self._task
                except asyncio.CancelledError:
                    if not self._task.cancelled():
                        # It is the waiting that was cancelled: the screen goes.
                        self._task.cancel()
                        raise
                    go_on = False
                    await self._end(lane, "stopped")
                if not go_on:
                    break
        finally:
            self.busy, self._task, self.loading = False, None, ""
            for lane in lanes:
                lane.doing = ""
            self._post(TalkChanged())

    def stop(self) -> None:
        """Stops the answer that runs, and those that wait behind it."""
        if self._task is not None:
            self._task.cancel()

    async def close(self) -> None:
        """Ends the process."""
        self.stop()
        await self._session.close()

    async def _answer(self, lane: Lane) -> bool:
        """Whether the next lane may be answered."""
        lane.begin(0)
        lane.doing = "waits for the model"
        self._post(Began(lane))
        try:
            client, setup = await self._client(), await self._setup()
            prompting = lane.prompting
            assert prompting is not None
            ids = await asyncio.to_thread(encode_conversation, lane.conversation.messages(), prompting)
            answer = await self._stream(lane, client, ids)
        except EdgepeftError as error:
            await self._end(lane, f"{error}\nNothing is lost: r in the answers asks again.", trouble=True)
            return self._session.alive
        limit = (self.sampling or self.advised).max_new_tokens
        notes = {
            "length": f"cut at {limit} tokens; F10 allows more",
            "context": f"cut: the model's context of {setup.entry.shape.context_length:,} tokens is full",
        }
        lane.tokens_per_second = answer.tokens_per_second or lane.tokens_per_second
        await self._end(lane, notes.get(answer.stopped_by, "" if answer.ids else "an empty answer"))
        return True

    async def _stream(self, lane: Lane, client: InferenceClient, ids: Sequence[int]) -> Answer:
        prompting = lane.prompting
        assert prompting is not None
        text = TextStream(lambda some: prompting.tokenizer.decode(some, skip_special_tokens=True))
        uses = [one.use for one in lane.chosen]
        lane.begin(len(ids))
        lane.doing = "reads"
        self._post(TalkChanged())
        drawn, answer = 0.0, None
        async for reply in client.generate(ids, prompting.stop_ids, self.sampling or self.advised, uses):
            if isinstance(reply, Answer):
                lane.take_in(text.finish(), 0)
                answer = reply
                continue
            lane.take_in(text.push(reply.ids), len(reply.ids))
            now = time.monotonic()
            if now - drawn >= _DRAW_SECONDS:
                drawn = now
                self._post(Grew(lane))
                self._post(TalkChanged())
        if answer is None:
            raise EdgepeftError("the answer broke off", where="inference")
        return answer

    async def _end(self, lane: Lane, note: str, *, trouble: bool = False) -> None:
        lane.doing = ""
        if lane.answer:
            lane.conversation.answer(lane.answer, lane.answered_by)
            self._post(Ended(lane, note, trouble))
            await self._keep(lane)
        else:
            self._post(Ended(lane, note or "an empty answer", trouble))

    async def _keep(self, lane: Lane) -> None:
        from edgepeft.chat.archive import new_path

        if lane.path is None:
            lane.path = new_path(lane.conversation.turns[0].content)
        model = self.setup.entry.name if self.setup is not None else self.start.model
        try:
            await asyncio.to_thread(lane.conversation.save, lane.path, model)
        except EdgepeftError as error:
            self._tell([f"The conversation is not kept: {error}"])

    async def _setup(self) -> Setup:
        """The setup in force; made of the start where nothing was chosen yet."""
        async with self._choosing:
            if self.setup is None:
                lane = self.lane
                prepared = await asyncio.to_thread(
                    prepare, self.start.model or None, [self.start.adapters], self.precision, self._progress
                )
                self._take(prepared)
                lane.adopt(prepared.lanes[0], prepared.promptings[0])
                self._tell([*prepared.setup.warnings, *prepared.promptings[0].warnings])
                self._post(TalkChanged())
        assert self.setup is not None
        return self.setup

    async def _client(self) -> InferenceClient:
        setup = await self._setup()
        try:
            client, warnings = await self._session.ready(setup, self._progress)
        finally:
            self.loading = ""
            self._post(TalkChanged())
        self._tell(warnings)
        return client

    def _progress(self, what: str, fraction: float | None) -> None:
        self.loading = what if fraction is None else f"{what} {fraction:.0%}"
        self._post(TalkChanged())

    def _tell(self, texts: Sequence[str]) -> None:
        for text in texts:
            self._post(Told(text))
