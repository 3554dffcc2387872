"""The exact tokens of a record, as pieces of text that say whether they are trained."""

from __future__ import annotations

from typing import NamedTuple

from edgepeft.data.encode import Tokenized, render_record, tokenize
from edgepeft.data.records import Record
from edgepeft.data.template import ChatTemplate
from edgepeft.data.tokens import Tokenizer
from edgepeft.spec import TrainOn


class Piece(NamedTuple):
    """One token, or several that make up one character."""

    ids: tuple[int, ...]
    text: str
    """What it stands for, control tokens by their names."""
    trained: bool
    special: bool
    """Whether it is a control token."""


class PreviewedSample(NamedTuple):
    """One sample of a record."""

    pieces: list[Piece]
    tokens: int
    trained: int
    """Tokens that carry loss."""
    notes: tuple[str, ...]


def preview_record(
    record: Record, tokenizer: Tokenizer, template: ChatTemplate | None, train_on: TrainOn, system: str | None
) -> list[PreviewedSample]:
    """The samples of one record, token by token.

    Raises:
        RecordError: the template refuses the conversation; the message says why.
    """
    rendered = render_record(record, template, train_on, system=system)
    stops = frozenset(tokenizer.stop_token_ids(template))
    return [
        PreviewedSample(_pieces(item, tokenizer), len(item.ids), sum(item.mask), item.rendered.notes)
        for item in tokenize(rendered, tokenizer, stops)
    ]


def show_blanks(text: str) -> str:
    """Blanks as signs: space ·, tab →, line end ↵ (and the line does end there), others by their numbers."""
    signs = {" ": "·", "\n": "↵\n", "\t": "→", "\r": "␍"}
    return "".join(signs.get(char) or (char if char.isprintable() else f"‹U+{ord(char):04X}›") for char in text)


def _pieces(item: Tokenized, tokenizer: Tokenizer) -> list[Piece]:
    text = item.rendered.text
    pieces: list[Piece] = []
    previous = (-1, -1)
    for token, trained, offsets in zip(item.ids, item.mask, item.offsets, strict=True):
        begin, end = offsets
        special = token in tokenizer.added_ids
        if not special and offsets == previous and pieces and end > begin:
            # Bytes of one character: they are shown as that character.
            last = pieces[-1]
            pieces[-1] = last._replace(ids=(*last.ids, token), trained=last.trained or trained)
            continue
        shown = tokenizer.decode([token]) if special or end <= begin else text[begin:end]
        pieces.append(Piece((token,), shown, trained, special))
        previous = offsets
    return pieces
