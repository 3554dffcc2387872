"""What the keys of the Chat screen do."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, get_args

from textual import work

from edgepeft.chat.archive import KeptConversation, as_markdown, list_kept
from edgepeft.chat.conversation import Conversation, StoredConversation, read_stored
from edgepeft.chat.protocol import Sampling
from edgepeft.chat.setup import ChosenAdapter
from edgepeft.errors import EdgepeftError
from edgepeft.paths import write_atomic
from edgepeft.spec import Precision
from edgepeft_tui.chat.choices import STRONGEST, read_models
from edgepeft_tui.chat.segments import code_blocks
from edgepeft_tui.chat.talk import Talk, TalkChanged
from edgepeft_tui.clipboard import copy_text
from edgepeft_tui.screens.chat_dialogs import STEP, WRITE, ChooseAdapters, KeptDialog, SamplingDialog
from edgepeft_tui.screens.dialogs import Ask, Pick
from edgepeft_tui.screens.room import Room
from edgepeft_tui.widgets.composer import Composer

_AS_TRAINED = "as trained"


class ChatDeeds(Room):
    """Actions over a talk; the screen draws it."""

    talk: Talk
    editing = False
    """Whether what is written takes the place of the last question."""
    _draft = ""
    """What was being written before the last question came back."""

    # Work that waits, and how its errors are told.

    def choose(self, deed: Coroutine[Any, Any, Any]) -> None:
        """Runs what chooses base or adapters; a newer choice ends an older one."""
        self.run_worker(self.quietly(deed), group="choose", exclusive=True, exit_on_error=False)

    async def quietly(self, deed: Coroutine[Any, Any, Any]) -> None:
        """Awaits `deed`; what goes wrong is told, and everything stays as it was."""
        try:
            await deed
        except (EdgepeftError, OSError) as error:
            self._app.tell_error(error)
        self.post_message(TalkChanged())

    async def open_and_load(
        self, model: str | None, lanes: Sequence[Sequence[str | ChosenAdapter]], *, keep: bool = True
    ) -> None:
        """Takes a base with adapters and starts its process, since it was chosen."""
        await self.talk.open(model, lanes, keep=keep)
        await self.talk.load()

    def _free(self) -> bool:
        """Whether the lanes may change now; says so where not."""
        if self.talk.busy:
            self._app.tell("An answer runs; escape stops it", severity="warning")
        return not self.talk.busy

    # Writing and answering.

    def action_send(self) -> None:
        """Puts what is written to the lanes. While an answer runs it stays where it is."""
        composer = self.query_one(Composer)
        text = composer.text
        if not text.strip() or not self._free():
            return
        editing, self.editing = self.editing, False
        composer.text, self._draft = self._draft, ""
        self._answer(self.talk.ask(text, instead=editing))

    def action_new_line(self) -> None:
        """A line end where the cursor is."""
        composer = self.query_one(Composer)
        composer.focus()
        composer.insert("\n")

    async def action_stop_or_back(self) -> None:
        """Stops the answer; else gives up changing a question, or a load; else goes back."""
        if self.talk.busy:
            self.talk.stop()
        elif self.editing:
            self.editing = False
            self.query_one(Composer).text = self._draft
            self._draft = ""
            self.post_message(TalkChanged())
        elif self.talk.loading:
            self.workers.cancel_group(self, "choose")
        else:
            await self._app.action_go_back()

    def action_edit_last(self) -> None:
        """Brings the last question back; it is replaced when it is sent."""
        question = self.talk.lane.last_question
        if question is None or self.editing or not self._free():
            return
        composer = self.query_one(Composer)
        self._draft, self.editing = composer.text, True
        composer.text = question
        composer.move_cursor(composer.document.end)
        composer.focus()
        self.post_message(TalkChanged())

    def action_again(self) -> None:
        """Another answer to the last question."""
        if self.talk.lane.last_question is not None and self._free():
            self._answer(self.talk.answer_again())

    def _answer(self, deed: Coroutine[Any, Any, None]) -> None:
        self.talk.busy = True
        self.run_worker(self.quietly(deed), group="answer", exclusive=True, exit_on_error=False)

    # Adapters.

    def action_next_adapter(self) -> None:
        """The next one of this base, by name."""
        fitting = self.talk.fitting
        if not fitting:
            self._app.tell("No adapter in the library is for this base; F3 plans one", severity="warning")
            return
        active = [one.adapter.reference for one in self.talk.lane.chosen]
        known = [adapter.reference for adapter in fitting]
        at = known.index(active[-1]) + 1 if active and active[-1] in known else 0
        self.choose(self.talk.adopt((ChosenAdapter(fitting[at % len(fitting)]),)))

    def action_base_alone(self) -> None:
        """No adapter answers."""
        self.choose(self.talk.adopt(()))

    def action_strength(self, steps: int) -> None:
        """The adapter, or all of them, by steps of 0.1."""
        chosen = self.talk.lane.chosen
        if not chosen:
            self._app.tell("The base alone answers; ctrl+n takes an adapter", severity="warning")
            return
        changed = tuple(
            ChosenAdapter(one.adapter, round(min(STRONGEST, max(-STRONGEST, one.scale + steps * STEP)), 2))
            for one in chosen
        )
        self.talk.lane.chosen = changed
        self.post_message(TalkChanged())

    def action_choose_adapters(self) -> None:
        """A list of those of this base, with strengths."""

        def take(chosen: tuple[ChosenAdapter | None, ...] | None) -> None:
            if chosen is not None:
                self.choose(self.talk.adopt(tuple(one for one in chosen if one is not None)))

        self.app.push_screen(ChooseAdapters(self.talk.fitting, self.talk.lane.chosen), take)

    def action_compare(self) -> None:
        """Asks for the lanes; while comparing, goes on with the current one."""
        if not self._free():
            return
        if self.talk.comparing:
            self.talk.go_on_alone()
            return
        setup = self.talk.setup
        if setup is None or not self.talk.fitting:
            self._app.tell("Comparing needs an adapter of this base; F3 plans one", severity="warning")
            return
        present = self.talk.lane.chosen[:1] or (ChosenAdapter(self.talk.fitting[0]),)

        def take(chosen: tuple[ChosenAdapter | None, ...] | None) -> None:
            if chosen is not None:
                lanes = [(one,) if one is not None else () for one in chosen]
                self.choose(self.talk.open(setup.entry.name, lanes, keep=True))

        self.app.push_screen(ChooseAdapters(self.talk.fitting, (None, *present), lanes=True), take)

    # Base, precision, system message, sampling.

    @work(group="dialog", exit_on_error=False)
    async def action_choose_model(self) -> None:
        """Another base; the process changes with it."""
        if not self._free():
            return
        rows = await asyncio.to_thread(read_models)
        name = await self.app.push_screen_wait(Pick("Which base answers?", rows, title="Model"))
        if name:
            self.talk.precision = None
            self.choose(self.open_and_load(name, [()]))

    @work(group="dialog", exit_on_error=False)
    async def action_precision(self) -> None:
        """How the base is held; the process starts anew with it."""
        setup = self.talk.setup
        if setup is None or not self._free():
            return
        rows = [(name, name) for name in (_AS_TRAINED, *get_args(Precision))]
        name = await self.app.push_screen_wait(Pick("How is the base held in memory?", rows, title="Precision"))
        if name:
            self.talk.precision = None if name == _AS_TRAINED else name
            lanes = [lane.chosen for lane in self.talk.lanes]
            self.choose(self.open_and_load(setup.entry.name, lanes))

    def action_system(self) -> None:
        """The system message of every lane."""

        def take(text: str | None) -> None:
            if text is not None:
                for lane in self.talk.lanes:
                    lane.conversation.system, lane.own_system = text or None, True

        system = self.talk.lane.conversation.system or ""
        self.app.push_screen(
            Ask("What should the model know before the first question?", system, title="System message"), take
        )

    def action_sampling(self) -> None:
        """Temperature and the like."""

        def take(sampling: Sampling | None) -> None:
            if sampling is not None:
                self.talk.sampling = sampling

        self.app.push_screen(SamplingDialog(self.talk.sampling or self.talk.advised), take)

    # Keeping and copying.

    @work(group="dialog", exit_on_error=False)
    async def action_kept(self) -> None:
        """The kept conversations."""
        try:
            kept = await asyncio.to_thread(list_kept)
        except (EdgepeftError, OSError) as error:
            self._app.tell_error(error)
            return
        path = self.talk.lane.path
        answer = await self.app.push_screen_wait(KeptDialog(kept, str(path) if path else ""))
        if answer == WRITE:
            self.action_write_file()
        elif answer is not None and self._free():
            if isinstance(answer, KeptConversation):
                self.choose(self._reopen(answer))
            else:
                self.talk.begin_anew()

    async def _reopen(self, kept: KeptConversation) -> None:
        stored = await asyncio.to_thread(read_stored, kept.path)
        try:
            await self.talk.open(stored.model, [kept.adapters])
        except EdgepeftError as error:
            # An adapter may be gone since; the conversation is not.
            self._app.tell_error(error)
            await self.talk.open(stored.model, [()])
        self.talk.begin_anew(Conversation.resume(stored), kept.path)
        await self.talk.count()

    def action_new_conversation(self) -> None:
        """Empty; the one before is kept."""
        if self._free():
            self.talk.begin_anew()

    def action_write_file(self) -> None:
        """Asks where to."""
        if not self.talk.lane.conversation.turns:
            self._app.tell("There is nothing to write yet", severity="warning")
            return

        def take(path: str | None) -> None:
            if path:
                self.run_worker(self.quietly(self._write(Path(path).expanduser())), group="write")

        question = "Write this conversation to which file? .json can be reopened, anything else is Markdown."
        self.app.push_screen(Ask(question, "conversation.md", title="Write"), take)

    async def _write(self, path: Path) -> None:
        conversation, setup = self.talk.lane.conversation, self.talk.setup
        model = setup.entry.name if setup is not None else self.talk.start.model
        if path.suffix == ".json":
            await asyncio.to_thread(conversation.save, path, model)
        else:
            text = as_markdown(StoredConversation(model, conversation.system, tuple(conversation.turns)))
            await asyncio.to_thread(write_atomic, path, text)
        self._app.tell(f"Written to {path.absolute()}")

    def action_copy_answer(self) -> None:
        """The last answer of the current lane, as the model wrote it."""
        answer = self.talk.lane.last_answer
        if answer is None:
            self._app.tell("There is no answer yet", severity="warning")
        else:
            self._copy(answer, "The answer")

    @work(group="dialog", exit_on_error=False)
    async def action_copy_code(self) -> None:
        """A block of code of the last answer; asks which where there are several."""
        blocks = code_blocks(self.talk.lane.last_answer or "")
        if not blocks:
            self._app.tell("The last answer has no block of code", severity="warning")
            return
        at: str | None = "0"
        if len(blocks) > 1:
            lines = [next((line for line in block.splitlines() if line.strip()), "") for block in blocks]
            rows = [(str(index), f"{index + 1}  {line}") for index, line in enumerate(lines)]
            at = await self.app.push_screen_wait(Pick("Which block?", rows, title="Code"))
        if at is not None:
            self._copy(blocks[int(at)], "The code")

    @work(thread=True, group="copy", exit_on_error=False)
    def _copy(self, text: str, what: str) -> None:
        way = copy_text(self.app, text)
        self.app.call_from_thread(self._app.tell, f"{what} was {way}")
