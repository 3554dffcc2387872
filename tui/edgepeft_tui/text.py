"""Text from outside, made safe to draw."""

from __future__ import annotations

LONGEST = 4000
"""Characters of one line that are drawn: nobody reads more of it, and a terminal chokes on megabytes."""


def visible(text: str) -> str:
    """`text` on one line: control characters, which could move the cursor or reorder the line, become dots."""
    return "".join(char if char.isprintable() else "·" for char in text[:LONGEST])


def visible_lines(text: str) -> str:
    """`text` with its line ends and tabs; other control characters become dots."""
    return "".join(char if char.isprintable() or char in "\n\t" else "·" for char in text.replace("\r\n", "\n"))
