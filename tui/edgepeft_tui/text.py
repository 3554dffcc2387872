"""Text from outside, made safe to draw."""

from __future__ import annotations

from edgepeft_tui.glyphs import ASCII, glyphs

_ASCII = str.maketrans("→…·–—×°₂≤≥±│┤├─└┬┴┐┘┌┼", ">~---xo2<>+|||-+++++++")
LONGEST = 4000
"""Characters of one line that are drawn: nobody reads more of it, and a terminal chokes on megabytes."""


def visible(text: str) -> str:
    """`text` on one line: control characters, which could move the cursor or reorder the line, become dots."""
    return drawable("".join(char if char.isprintable() else "·" for char in text[:LONGEST]))


def visible_lines(text: str) -> str:
    """`text` with its line ends and tabs; other control characters become dots."""
    lines = text.replace("\r\n", "\n")
    return drawable("".join(char if char.isprintable() or char in "\n\t" else "·" for char in lines))


def drawable(text: str) -> str:
    """`text` as the terminal can show it: where only ASCII is drawn, one sign for each that it does not have."""
    if glyphs() is not ASCII or text.isascii():
        return text
    return text.translate(_ASCII).encode("ascii", "replace").decode()
