"""A long answer in Markdown, cut into parts that can be drawn one by one.

Textual draws the last top-level block of a document anew with each word that comes: a list or code of some hundred
lines would take longer each time. So a part that grew long is closed, and the rest goes into a new one. What is cut is
only the drawing; the answer itself stays whole.
"""

from __future__ import annotations

import re

LONGEST_LINES = 24
"""Lines of a part after which it is closed where the text allows it."""
LONGEST_CHARACTERS = 2400
"""Characters of a part after which it is closed at the next word."""
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")


class Segments:
    """Takes text as it comes; says for each piece what goes on in the last part and what begins new ones."""

    def __init__(self) -> None:
        self._lines = 0
        self._characters = 0
        self._line = ""
        """The line that is not complete yet."""
        self._fence = ""
        """The opening line of the code that stands open; empty outside code."""
        self._table: list[str] = []
        """The first two lines of the table that stands open."""

    def push(self, text: str) -> list[str]:
        """The first item continues the last part; each further one begins a part."""
        parts = [""]
        for line in text.splitlines(keepends=True):
            self._take(line, parts)
        return parts

    def _take(self, piece: str, parts: list[str]) -> None:
        if not self._line and self._must_close(piece):
            self._close(parts)
        for start in range(0, len(piece), LONGEST_CHARACTERS):
            if self._characters >= 2 * LONGEST_CHARACTERS:
                # One endless line; nobody writes such a thing for a reader.
                self._close(parts)
            some = piece[start : start + LONGEST_CHARACTERS]
            parts[-1] += some
            self._characters += len(some)
        self._line += piece
        if piece.endswith("\n"):
            self._see_line(self._line.rstrip("\n"))
            self._line = ""
            self._lines += 1

    def _must_close(self, piece: str) -> bool:
        if self._characters >= LONGEST_CHARACTERS or self._lines >= 2 * LONGEST_LINES:
            return True
        # A line that begins further right belongs to an item above it.
        return self._lines >= LONGEST_LINES and (bool(self._fence) or piece[:1] not in " \t\n")

    def _close(self, parts: list[str]) -> None:
        if self._fence:
            mark = _fence_of(self._fence)[0]
            parts[-1] += f"\n{mark}\n" if self._line else f"{mark}\n"
        again = [self._fence] if self._fence else self._table if len(self._table) == 2 and not self._line else []
        parts.append("".join(f"{line}\n" for line in again))
        self._lines = self._characters = 0

    def _see_line(self, line: str) -> None:
        if not line.startswith("|"):
            self._table = []
        elif len(self._table) < 2:
            self._table.append(line)
        mark, info = _fence_of(line)
        if not self._fence:
            if mark and not (mark[0] == "`" and "`" in info):
                self._fence = line
        elif mark and not info.strip():
            opened = _fence_of(self._fence)[0]
            if mark[0] == opened[0] and len(mark) >= len(opened):
                self._fence = ""


def code_blocks(text: str) -> list[str]:
    """The contents of the fenced code in an answer, in order; one that was not closed goes to the end."""
    blocks: list[str] = []
    opened = ""
    for line in text.splitlines():
        mark, info = _fence_of(line)
        if opened:
            if mark and not info.strip() and mark[0] == opened[0] and len(mark) >= len(opened):
                opened = ""
            else:
                blocks[-1] += line + "\n"
        elif mark and not (mark[0] == "`" and "`" in info):
            opened = mark
            blocks.append("")
    return blocks


def _fence_of(line: str) -> tuple[str, str]:
    """The mark and what follows it; two empty texts where `line` is not a fence."""
    found = _FENCE.match(line)
    return (found.group(1), found.group(2)) if found else ("", "")
