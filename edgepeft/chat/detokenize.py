"""Token ids to text while they come, never half a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_HALF = "\ufffd"
_HELD_CHARACTERS = 3
"""An unfinished character of UTF-8 has at most three bytes, and decoders write at most one mark for each; further marks
before these are what the model means."""
_CONTEXT_TOKENS = 6
"""Tokens decoded again before the new ones: some tokenizers write a token by what stands before it."""


class TextStream:
    """Text of an answer, piece by piece; the pieces joined are the decoded whole.

    Args:
        decode: token ids to text, special tokens left out as the caller wants.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0
        """Tokens before this one are decoded no more."""
        self._told = 0
        """So many characters of the text from `_start` on have been given out."""

    def push(self, ids: Sequence[int]) -> str:
        """Takes the next tokens; returns the text that is now certain, which may be none."""
        self._ids += ids
        text = self._decode(self._ids[self._start :])
        marks = len(text) - len(text.rstrip(_HALF))
        certain = len(text) - min(marks, _HELD_CHARACTERS)
        piece = text[self._told : certain]
        self._told = max(self._told, certain)
        if not marks:
            self._start = max(0, len(self._ids) - _CONTEXT_TOKENS)
            self._told = len(self._decode(self._ids[self._start :]))
        return piece

    def finish(self) -> str:
        """The rest; an unfinished character becomes the replacement character."""
        text = self._decode(self._ids[self._start :])
        piece = text[self._told :]
        self._told = len(text)
        return piece
