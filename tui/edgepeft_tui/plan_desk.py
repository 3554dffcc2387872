"""Where questions wait for the planner: one is worked on at a time, and the newest wins."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from textual.message import Message

from edgepeft.errors import Interrupted
from edgepeft_tui.plan_messages import PlanIdle, Planned, PlanProgress, PlanRefused
from edgepeft_tui.plans import Planner, PlanView, Question, Refusal, Superseded

MOST_UNDONE = 50
"""Changes that can be taken back."""


class Desk:
    """What is asked now, what was asked before, and the thread's work on it. The screen owns it.

    Args:
        planner: answers.
        post: gives a message to the screen; called from the thread.
        start: starts a thread that calls `work`.
        first: called in that thread with a question before the work on it begins, for what can be said at once.
    """

    def __init__(
        self,
        planner: Planner,
        post: Callable[[Message], object],
        start: Callable[[], object],
        first: Callable[[Question], object],
    ) -> None:
        self.planner = planner
        self.question = Question()
        """What is asked; its answer may not be there yet."""
        self.good: Question | None = None
        """The last question that had a plan, or that did not fit: what a wrong value falls back to."""
        self.busy = False
        self._undo: list[Question] = []
        self._post, self._start, self._first = post, start, first
        self._newest = self._answered = 0

    def ask(self, question: Question, *, undoable: bool = True) -> None:
        """Asks; an older question that is still being worked on is given up."""
        if undoable and self.good is not None and msgspec.structs.replace(question, verify=False) != self.good:
            self._undo = [*self._undo[-MOST_UNDONE:], self.good]
        self.question = question
        self._newest += 1
        if self.busy:
            self.planner.cancel()
        else:
            self.busy = True
            self._start()

    def undone(self) -> Question | None:
        """What was asked before the last change, which is then forgotten; None where there was none."""
        while self._undo:
            before = self._undo.pop()
            if before != msgspec.structs.replace(self.question, verify=False):
                return before
        return None

    def accept(self, question: Question) -> None:
        """Notes that a question had an answer to fall back to."""
        self.good = msgspec.structs.replace(question, verify=False)

    def give_up(self) -> bool:
        """Falls back to what had an answer after a value that cannot be meant; False where nothing had."""
        if self.good is None:
            return False
        self._undo = [before for before in self._undo if before != self.good]
        self.question = self.good
        return True

    def rest(self) -> None:
        """The thread has ended; a question that came in while it did so is taken up."""
        self.busy = False
        if self._newest != self._answered:
            self.busy = True
            self._start()

    def work(self) -> None:
        """In a thread: answers questions until none waits."""
        while self._newest != self._answered:
            ticket, question = self._newest, self.question
            try:
                self._first(question)
                for answer in self.planner.answer(question, self._tell, lambda ticket=ticket: ticket != self._newest):  # type: ignore[misc]
                    if isinstance(answer, PlanView):
                        self._post(Planned(question, answer))
                    else:
                        self._post(PlanRefused(question, answer))
            except Superseded:
                pass
            except Interrupted as error:
                if ticket == self._newest:
                    self._post(PlanRefused(question, Refusal(str(error))))
            except Exception as error:  # noqa: BLE001 - a bug of ours must not leave the screen waiting for ever
                self._post(PlanRefused(question, Refusal(f"{type(error).__name__}: {error}")))
            self._answered = ticket
        self._post(PlanIdle())

    def _tell(self, what: str, share: float | None) -> None:
        self._post(PlanProgress(what, share))
