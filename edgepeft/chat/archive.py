"""Conversations that are kept under the home folder, one file each, newest first."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import msgspec

from edgepeft.chat.conversation import StoredConversation, read_stored
from edgepeft.errors import BadInput
from edgepeft.paths import as_name, disk_errors, home

_TITLE_CHARACTERS = 40
_MOST_LISTED = 300
"""Conversations that a list reads; older ones stay where they are."""


class KeptConversation(msgspec.Struct, frozen=True):
    """One file in the archive."""

    path: Path
    changed: float
    """When it was written last, in seconds since 1970."""
    model: str
    adapters: tuple[str, ...]
    """What gave the last answer."""
    title: str
    """Its first question, on one line."""
    questions: int


def new_path(question: str, now: datetime | None = None) -> Path:
    """Where a conversation that begins with `question` is kept; no file is made."""
    begun = (now or datetime.now()).strftime("%Y%m%d-%H%M%S")
    name = f"{begun}-{as_name(question[:_TITLE_CHARACTERS])}"
    folder = home().conversations
    path, number = folder / f"{name}.json", 2
    while path.exists():
        path, number = folder / f"{name}-{number}.json", number + 1
    return path


def list_kept(most: int = _MOST_LISTED) -> list[KeptConversation]:
    """The newest conversations, newest first; files that are none are passed over.

    Raises:
        DiskProblem: the folder may not be read.
    """
    folder = home().conversations
    if not folder.is_dir():
        return []
    with disk_errors(folder):
        dated = sorted(((path.stat().st_mtime, path) for path in folder.glob("*.json")), reverse=True)
    found: list[KeptConversation] = []
    for changed, path in dated:
        if len(found) == most:
            break
        try:
            found.append(_summary(path, changed, read_stored(path)))
        except BadInput:
            continue
    return found


def forget(path: Path) -> None:
    """Deletes a kept conversation; one that is gone is fine.

    Raises:
        DiskProblem: the file may not be deleted.
    """
    with disk_errors(path):
        path.unlink(missing_ok=True)


def as_markdown(stored: StoredConversation) -> str:
    """A conversation to read: a heading for each turn with who wrote it."""
    parts = [f"# Conversation with {stored.model}"]
    if stored.system:
        parts.append(f"## System\n\n{stored.system}")
    for turn in stored.turns:
        who = "You" if turn.role == "user" else " + ".join(turn.adapters) or "base"
        parts.append(f"## {who}\n\n{turn.content}")
    return "\n\n".join(parts) + "\n"


def _summary(path: Path, changed: float, stored: StoredConversation) -> KeptConversation:
    questions = [turn.content for turn in stored.turns if turn.role == "user"]
    answers = [turn for turn in stored.turns if turn.role == "assistant"]
    return KeptConversation(
        path=path,
        changed=changed,
        model=stored.model,
        adapters=answers[-1].adapters if answers else (),
        title=" ".join(questions[0].split()) if questions else "",
        questions=len(questions),
    )
