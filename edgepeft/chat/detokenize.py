"""Token ids to text while they come, never half a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_HALF = "\ufffd"
_CONTEXT_TOKENS = 6
"""Tokens decoded again before the new ones: some tokenizers write a token by what stands before it."""
_LONGEST_CHARACTER_TOKENS = 8
"""A replacement character that stays for so many tokens is not half a character, the model means it."""


class TextStream:
    """Text of an answer, piece by piece; the pieces joined are the decoded whole.

    Args:
        decode: token ids to text, special tokens left out as the caller wants.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0
        """Where the context before the new tokens begins."""
        self._told = 0
        """So many tokens have been given out as text."""

    def push(self, ids: Sequence[int]) -> str:
        """Takes the next tokens; returns the text that is now certain, which may be none."""
        self._ids += ids
        before = self._decode(self._ids[self._start : self._told])
        whole = self._decode(self._ids[self._start :])
        if whole.endswith(_HALF) and len(self._ids) - self._told < _LONGEST_CHARACTER_TOKENS:
            return ""
        return self._give(before, whole)

    def finish(self) -> str:
        """The rest; an unfinished character becomes the replacement character."""
        return self._give(self._decode(self._ids[self._start : self._told]), self._decode(self._ids[self._start :]))

    def _give(self, before: str, whole: str) -> str:
        self._told = len(self._ids)
        self._start = max(0, self._told - _CONTEXT_TOKENS)
        return whole[len(before) :]
