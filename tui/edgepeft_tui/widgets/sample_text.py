"""Samples as the model reads them, drawn so that the loss mask is seen with and without colour; and their lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from edgepeft_tui.finds import DrawnSample
from edgepeft_tui.glyphs import ASCII, glyphs
from edgepeft_tui.text import visible_lines

if TYPE_CHECKING:
    from edgepeft.data.statistics import Bin

_PLAIN = str.maketrans({"·": "_", "→": ">", "↵": "$", "␍": "%", "‹": "<", "›": ">", "█": "#", "–": "-", "⋮": ":"})
_EIGHTHS = str.maketrans(dict.fromkeys("▏▎▍▌▋▊▉", "#"))


def _marks() -> tuple[str, str]:
    return ("[[", "]]") if glyphs() is ASCII else ("⟦", "⟧")


def _drawable(text: str) -> str:
    return text.translate(_PLAIN).translate(_EIGHTHS) if glyphs() is ASCII else text


def mask_key() -> Text:
    """How to read a drawn sample."""
    begin, end = _marks()
    key = Text()
    key.append(f"{begin}trained{end}", style="bold green")
    key.append(_drawable("  not trained  · a space  ↵ a line end  → a tab"), style="dim")
    return key


def draw_sample(sample: DrawnSample) -> Text:
    """Its text with marks around what is trained, control tokens set off."""
    from edgepeft.data.preview import show_blanks

    if sample.trouble:
        return Text(f"This record cannot be used: {visible_lines(sample.trouble)}", style="yellow")
    begin, end = _marks()
    text, trained = Text(), False
    for piece in sample.pieces:
        if piece.trained != trained:
            text.append(begin if piece.trained else end, style="bold green")
            trained = piece.trained
        style = "bold green" if piece.trained else "magenta" if piece.special else "dim"
        text.append(visible_lines(_drawable(show_blanks(piece.text))), style=style)
    if trained:
        text.append(end, style="bold green")
    return text


def draw_lengths(bins: Sequence[Bin], width: int) -> Text:
    """The histogram of sample lengths in tokens."""
    from edgepeft.data.statistics import draw_histogram

    lines = draw_histogram(bins, width) if bins else []
    return Text("\n".join(_drawable(line) for line in lines), no_wrap=True, overflow="crop")
