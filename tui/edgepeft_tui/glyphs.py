"""The signs that are drawn: Unicode where the terminal shows it, ASCII where it does not or the user wants that."""

from __future__ import annotations

import locale
import os
import sys

import msgspec


class Glyphs(msgspec.Struct, frozen=True):
    """One set of signs; each is one cell wide."""

    running: str = "●"
    done: str = "✓"
    trouble: str = "✗"
    paused: str = "‖"
    full: str = "█"
    empty: str = "░"
    shades: str = "█▓▒░▞▚▤▥▦▧▨▩◼"
    """For the parts of a stacked bar, in order, so that colour is not the only signal."""
    sparks: str = "▁▂▃▄▅▆▇█"
    """Heights, lowest first."""
    line: str = "│"
    more: str = "…"
    prompt: str = "›"
    up: str = "▲"
    down: str = "▼"
    dot: str = "·"
    bullet: str = "•"
    """Before an item of a list."""
    marker: str = "braille"
    """plotext's marker of a line."""


UNICODE = Glyphs()
ASCII = Glyphs(
    running="*",
    done="+",
    trouble="x",
    paused="=",
    full="#",
    empty=".",
    shades="#%&*+=o-:~^x@",
    sparks="_.-:=+*#",
    line="|",
    more="~",
    prompt=">",
    up="^",
    down="v",
    dot="-",
    bullet="*",
    marker="*",
)

_chosen = UNICODE


def glyphs() -> Glyphs:
    """The set in force."""
    return _chosen


def choose_glyphs(ascii_only: bool | None) -> Glyphs:
    """Sets the set in force; None asks the terminal's encoding."""
    global _chosen
    if ascii_only is None:
        ascii_only = not _shows_unicode()
    _chosen = ASCII if ascii_only else UNICODE
    return _chosen


def _shows_unicode() -> bool:
    encoding = getattr(sys.__stdout__, "encoding", None) or locale.getpreferredencoding(False)
    return "utf" in encoding.lower() and os.environ.get("TERM") != "linux-8bit"
