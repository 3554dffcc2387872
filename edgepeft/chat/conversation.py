"""A conversation: its system message and turns, kept, cut back and stored."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from edgepeft.errors import BadInput
from edgepeft.paths import write_atomic


class Turn(msgspec.Struct, frozen=True):
    """One message after the system message."""

    role: Literal["user", "assistant"]
    content: str
    adapters: tuple[str, ...] = ()
    """What answered, as `NAME@vK=scale`; empty for the base alone and for the user."""


class StoredConversation(msgspec.Struct, frozen=True):
    """The file that `/save` and the chat screen write."""

    model: str
    system: str | None
    turns: tuple[Turn, ...]


def read_stored(path: Path) -> StoredConversation:
    """What `Conversation.save` wrote.

    Raises:
        BadInput: the file cannot be read as a conversation.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=StoredConversation)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadInput(
            f"is not a saved conversation: {error}", where=str(path), hint="Give a file that /save wrote"
        ) from error


class Conversation:
    """The turns so far; the last one may be the user's, waiting for its answer."""

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.turns: list[Turn] = []

    def messages(self) -> list[dict[str, str]]:
        """Everything as a chat template takes it: role and content."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *({"role": turn.role, "content": turn.content} for turn in self.turns)]

    def ask(self, text: str) -> None:
        """Adds the user's turn."""
        self.turns.append(Turn("user", text))

    def answer(self, text: str, adapters: tuple[str, ...] = ()) -> None:
        """Adds the model's turn."""
        self.turns.append(Turn("assistant", text, adapters))

    def take_back(self) -> None:
        """Removes a question that got no answer."""
        if self.turns and self.turns[-1].role == "user":
            self.turns.pop()

    def take_back_answer(self) -> None:
        """Removes the last answer; its question waits again."""
        if self.turns and self.turns[-1].role == "assistant":
            self.turns.pop()

    def reset(self) -> None:
        """Forgets the turns, not the system message."""
        self.turns.clear()

    def save(self, path: Path, model: str) -> None:
        """Writes the conversation as JSON.

        Raises:
            DiskProblem: the file may not be written.
        """
        stored = StoredConversation(model, self.system, tuple(self.turns))
        write_atomic(path, msgspec.json.format(msgspec.json.encode(stored), indent=2) + b"\n")

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """Reads what `save` wrote.

        Raises:
            BadInput: the file cannot be read as a conversation.
        """
        return cls.resume(read_stored(path))

    @classmethod
    def resume(cls, stored: StoredConversation) -> Conversation:
        """Goes on with a stored one."""
        conversation = cls(stored.system)
        conversation.turns = list(stored.turns)
        return conversation
