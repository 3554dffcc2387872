"""What the workers of the Plan screen tell it."""

from __future__ import annotations

from dataclasses import dataclass

from textual.message import Message

from edgepeft_tui.choice_rows import ChoiceRow
from edgepeft_tui.finds import DemoChoice, Found
from edgepeft_tui.plans import Glance, PlanView, Question, Refusal


@dataclass
class Planned(Message, bubble=False):
    """A plan for a question, so far."""

    question: Question
    view: PlanView


@dataclass
class PlanRefused(Message, bubble=False):
    """There is no plan for a question."""

    question: Question
    refusal: Refusal


@dataclass
class PlanProgress(Message, bubble=False):
    """What the planner is doing, and which share of it is done, if known."""

    what: str
    share: float | None

    def can_replace(self, message: Message) -> bool:
        """Only the newest counts."""
        return isinstance(message, PlanProgress)


@dataclass
class PlanIdle(Message, bubble=False):
    """The planner has told all that it has to say to its last question."""


@dataclass
class Glanced(Message, bubble=False):
    """What a value that is being typed would make of the memory."""

    what: str
    text: str
    glance: Glance

    def can_replace(self, message: Message) -> bool:
        """Only what was typed last counts."""
        return isinstance(message, Glanced)


@dataclass
class LaunchEnded(Message, bubble=False):
    """A run was started, or why it was not."""

    run: str = ""
    error: Exception | None = None
    doubt: str = ""
    """Why it may not fit as things are now; nothing was started yet."""
    name: str = ""


@dataclass
class WordsFound(Message, bubble=False):
    """What a row may be."""

    row: ChoiceRow
    words: tuple[tuple[str, str], ...]


@dataclass
class ModelsFound(Message, bubble=False):
    """The models of the store."""

    models: tuple[Found, ...]


@dataclass
class DemoFound(Message, bubble=False):
    """The demo's model, data and values."""

    demo: DemoChoice
