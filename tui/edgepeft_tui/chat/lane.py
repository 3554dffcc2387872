"""One conversation beside others: its adapters, its turns, and what came of the answer that runs."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

from edgepeft.chat.conversation import Conversation
from edgepeft.chat.setup import ChosenAdapter, Prompting
from edgepeft_tui.chat.choices import label_of

_numbers = itertools.count(1)


class Lane:
    """A column of the chat; alone, it is the chat.

    Args:
        chosen: adapters that answer; none for the base alone.
        prompting: None until the base is known.
        conversation: to go on with.
        path: the file that keeps it; None before its first answer.
    """

    def __init__(
        self,
        chosen: tuple[ChosenAdapter, ...] = (),
        prompting: Prompting | None = None,
        conversation: Conversation | None = None,
        path: Path | None = None,
    ) -> None:
        self.number = next(_numbers)
        self.chosen = chosen
        self.prompting = prompting
        self.conversation = conversation or Conversation(prompting.system if prompting else None)
        self.own_system = False
        """Whether the system message was set by hand, so that other adapters do not bring theirs."""
        self.path = path
        self.context_tokens = 0
        """Tokens of the conversation, the last answer included."""
        self.answer_tokens = 0
        self.tokens_per_second: float | None = None
        self.answered_by: tuple[str, ...] = ()
        """Who gives the answer that runs, whatever was chosen since it began."""
        self.doing = ""
        """What it is about, in a word or two; empty when nothing is asked."""
        self._begun: float | None = None
        self._answer: list[str] = []
        self._unread: list[str] = []

    @property
    def label(self) -> str:
        """Who answers."""
        return label_of(self.chosen)

    @property
    def uses(self) -> tuple[str, ...]:
        """What a turn remembers of who answered."""
        return tuple(one.label for one in self.chosen)

    @property
    def answer(self) -> str:
        """What came of the answer that runs, or ran last."""
        return "".join(self._answer)

    @property
    def last_answer(self) -> str | None:
        """The newest answer in the conversation."""
        answers = [turn.content for turn in self.conversation.turns if turn.role == "assistant"]
        return answers[-1] if answers else None

    @property
    def last_question(self) -> str | None:
        """The newest question, answered or not."""
        questions = [turn.content for turn in self.conversation.turns if turn.role == "user"]
        return questions[-1] if questions else None

    def adopt(self, chosen: tuple[ChosenAdapter, ...], prompting: Prompting) -> None:
        """Other adapters answer from now on."""
        self.chosen, self.prompting = chosen, prompting
        if not self.own_system:
            self.conversation.system = prompting.system

    def begin(self, prompt_tokens: int) -> None:
        """An answer begins."""
        self.context_tokens, self.answer_tokens = prompt_tokens, 0
        self.tokens_per_second, self._begun = None, None
        self._answer, self._unread = [], []
        self.answered_by = self.uses

    def take_in(self, piece: str, tokens: int) -> None:
        """The next piece of the answer."""
        now = time.monotonic()
        if self._begun is None:
            self._begun, self.doing = now, "answers"
        elif now > self._begun:
            self.tokens_per_second = self.answer_tokens / (now - self._begun)
        self.answer_tokens += tokens
        self.context_tokens += tokens
        self._answer.append(piece)
        self._unread.append(piece)

    def take_unread(self) -> str:
        """What came since the last call."""
        text = "".join(self._unread)
        self._unread.clear()
        return text
