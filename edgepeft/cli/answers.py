"""Answers on a terminal or in a pipe, as they come."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgepeft.chat.detokenize import TextStream
from edgepeft.chat.protocol import Answer

if TYPE_CHECKING:
    from edgepeft.chat.client import AnswerStream
    from edgepeft.data.tokens import Tokenizer

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def stream_answer(stream: AnswerStream, tokenizer: Tokenizer, *, quiet: bool = False) -> tuple[str, Answer]:
    """Writes an answer to stdout while it comes, with a line end behind it; Ctrl-C stops the answer and returns it.

    Raises:
        EdgepeftError: the process could not answer.
    """

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    pieces: list[str] = []
    text = TextStream(decode)
    on_terminal = sys.stdout.isatty()

    def tell(piece: str) -> None:
        pieces.append(piece)
        if piece and not quiet:
            # A model can write escape sequences; a terminal must not obey them.
            sys.stdout.write(_CONTROLS.sub("\ufffd", piece) if on_terminal else piece)
            sys.stdout.flush()

    while True:
        try:
            reply = next(stream)
            if isinstance(reply, Answer):
                break
            tell(text.push(reply.ids))
        except KeyboardInterrupt:
            stream.cancel()
    tell(text.finish())
    if not quiet and not (pieces and "".join(pieces).endswith("\n")):
        sys.stdout.write("\n")
        sys.stdout.flush()
    return "".join(pieces), reply
