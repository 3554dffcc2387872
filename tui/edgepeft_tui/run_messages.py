"""What the workers of the Train screen tell it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from textual.message import Message

from edgepeft_tui.readings import Row
from edgepeft_tui.run_view import RunView

if TYPE_CHECKING:
    from edgepeft.runs.state import RunSummary

Command = Literal["pause", "stop", "resume", "end", "remove"]


@dataclass
class RunsListed(Message, bubble=False):
    """The runs were looked at; of many, the first some come before the last."""

    rows: tuple[Row, ...]
    summaries: dict[str, RunSummary]
    complete: bool
    """Whether these are all."""

    def can_replace(self, message: Message) -> bool:
        """A newer list makes an older one worthless."""
        return isinstance(message, RunsListed)


@dataclass
class RunFollowed(Message, bubble=False):
    """The chosen run was looked at."""

    view: RunView
    overlay: RunView | None = None
    """The run whose loss is drawn beside."""

    def can_replace(self, message: Message) -> bool:
        """A newer look makes an older one of the same run worthless, unless that tells what is told once."""
        return isinstance(message, RunFollowed) and message.view.id == self.view.id and not self.view.rescued


@dataclass
class RunUnreadable(Message, bubble=False):
    """The chosen run cannot be shown."""

    run: str
    why: str
    there: bool = True
    """Whether there is a folder that could be removed."""


@dataclass
class CommandDone(Message, bubble=False):
    """What was asked of a run was done, or the worker was told."""

    command: Command
    run: str
    said: str = ""
    """A sentence for the user."""


@dataclass
class CommandFailed(Message, bubble=False):
    """What was asked of a run cannot be."""

    command: Command
    run: str
    error: Exception


@dataclass
class TextRead(Message, bubble=False):
    """A longer text that was asked for."""

    title: str
    text: str
    kind: str = field(default="text")
