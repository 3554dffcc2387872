"""Text from outside, made safe to draw."""

from __future__ import annotations


def visible(text: str) -> str:
    """`text` on one line: control characters, which could move the cursor or reorder the line, become dots."""
    return "".join(char if char.isprintable() else "·" for char in text)
