"""How many tokens a text will be when its tokenizer is not at hand: a weight for each kind of character and run.

In English prose a token is a word, whatever its length; in other scripts, in numbers and in code it is a few
characters. So runs are counted as well as characters. Each tokenizer has its weights in profiles/tokenizers.
"""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np

from edgepeft.models.described import TokenWeights

Positions = np.ndarray[tuple[int], np.dtype[np.float64]]
Kinds = np.ndarray[tuple[int], np.dtype[np.uint8]]

_ENGLISH = re.compile(
    r"\b(?:the|and|of|to|in|is|that|for|it|with|as|was|on|are|be|this|by|you|or|from|what|how|my|not|have)\b", re.I
)
_ENGLISH_SHARE = 0.1
"""Share of these words that a text in English exceeds."""
_ACCENT_SHARE = 1 / 300
"""Accents to a letter above which a text without those words is in another language; code has hardly any."""
_SPECIAL = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>|<(?:bos|eos)>")
"""What chat templates write around turns: one token each."""
_OTHER, _BLANK, _LINE_END, _LETTER, _ACCENT, _DIGIT, _MARK, _FIRST_SCRIPT = range(8)
_SCRIPTS: tuple[tuple[str, tuple[tuple[int, int], ...]], ...] = (
    (
        "cjk",
        (
            (0x2E80, 0x2FFF),
            (0x3001, 0x312F),
            (0x3190, 0x9FFF),
            (0xF900, 0xFAFF),
            (0xFF00, 0xFFEF),
            (0x20000, 0x3FFFF),
        ),
    ),
    ("hangul", ((0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF))),
    ("cyrillic", ((0x0400, 0x052F), (0x1C80, 0x1C8F))),
    ("greek", ((0x0370, 0x03FF), (0x1F00, 0x1FFF))),
    ("arabic", ((0x0600, 0x077F), (0x08A0, 0x08FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFF))),
    ("hebrew", ((0x0590, 0x05FF),)),
    ("devanagari", ((0x0900, 0x097F),)),
    ("indic", ((0x0980, 0x0DFF),)),
)
"""Scripts with a weight of their own, and the code points of each, first and last included."""


def guess_tokens(text: str, weights: TokenWeights) -> float:
    """About how many tokens `text` is."""
    return float(token_positions(text, weights)[-1])


def token_positions(text: str, weights: TokenWeights) -> Positions:
    """About how many tokens stand before each character of `text`, and before its end; float64 [characters + 1]."""
    kinds = _kind_table()[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)]
    letters = (kinds == _LETTER) | (kinds == _ACCENT)
    first_letters = _begins(letters)
    english, other_language = _character_weights(weights)
    is_english = _is_english(text, kinds, int(np.count_nonzero(first_letters)))
    tokens = (english if is_english else other_language)[kinds]
    if is_english:
        tokens[first_letters] += weights.word
    tokens[_begins(kinds == _DIGIT)] += weights.number
    tokens[_begins(kinds == _MARK)] += weights.mark_run
    tokens[_begins(kinds == _LINE_END)] += weights.line_end
    # Blanks count only where several follow each other, as in indented code.
    blanks = kinds == _BLANK
    tokens[1:][_begins(blanks[1:] & blanks[:-1])] += weights.mark_run
    for special in _SPECIAL.finditer(text) if "<" in text or "[" in text else ():
        tokens[special.start() : special.end()] = 0.0
        tokens[special.start()] = 1.0
    return np.concatenate((np.zeros(1), np.cumsum(tokens)))


def _is_english(text: str, kinds: Kinds, words: int) -> bool:
    """Whether Latin letters of `text` are those of English or of code."""
    counts = np.bincount(kinds, minlength=_FIRST_SCRIPT)
    if counts[_ACCENT] <= _ACCENT_SHARE * counts[_LETTER]:
        return True
    return len(_ENGLISH.findall(text)) >= _ENGLISH_SHARE * words


def _begins(inside: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Where runs of true begin, [n]."""
    begins = inside.copy()
    begins[1:] &= ~inside[:-1]
    return begins


@lru_cache(maxsize=8)
def _character_weights(weights: TokenWeights) -> tuple[Positions, Positions]:
    """Tokens of one character of each kind: in English or code, and in another language of Latin script."""
    english = np.zeros(_FIRST_SCRIPT + len(_SCRIPTS))
    english[_OTHER], english[_DIGIT], english[_MARK] = weights.other, weights.digit, weights.mark
    for place, (name, _) in enumerate(_SCRIPTS):
        english[_FIRST_SCRIPT + place] = getattr(weights, name)
    other_language = english.copy()
    english[_LETTER], english[_ACCENT] = weights.letter, weights.accent
    other_language[_LETTER] = weights.european_letter
    other_language[_ACCENT] = weights.european_letter + weights.accent
    return english, other_language


@lru_cache(maxsize=1)
def _kind_table() -> Kinds:
    """The kind of every code point, uint8 [0x110000]."""
    table = np.zeros(0x110000, np.uint8)
    for kind, ranges in (
        (_ACCENT, ((0xC0, 0x24F), (0x300, 0x36F), (0x1E00, 0x1EFF))),
        (_MARK, ((0x21, 0x7E), (0xA1, 0xBF), (0x2010, 0x2027), (0x2030, 0x205E))),
        (_DIGIT, ((0x30, 0x39),)),
        (_LETTER, ((0x41, 0x5A), (0x61, 0x7A))),
        (_LINE_END, ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))),
        (_BLANK, ((0x09, 0x09), (0x0B, 0x0C), (0x20, 0x20), (0xA0, 0xA0), (0x2000, 0x200F), (0x3000, 0x3000))),
        *((_FIRST_SCRIPT + place, ranges) for place, (_, ranges) in enumerate(_SCRIPTS)),
    ):
        for low, high in ranges:
            table[low : high + 1] = kind
    return table
