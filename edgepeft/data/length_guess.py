"""Lengths of samples for a model whose tokenizer is not on this disk: read and rendered as ever, tokens estimated.

Conversations are rendered with ChatML, whose turns cost about as many tokens as those of other templates.
"""

from __future__ import annotations

import datetime
import hashlib
from pathlib import Path

import msgspec
import numpy as np

from edgepeft.data.encode import Rendered
from edgepeft.data.prepare import Progress, split_samples
from edgepeft.data.reading import RenderedFile, TokenCounts, check_usable, reading_notes
from edgepeft.data.template import BUILT_IN, ChatTemplate
from edgepeft.data.token_guess import token_positions
from edgepeft.data.token_table import Flags, Indices, Ints
from edgepeft.models.described import TokenWeights
from edgepeft.spec import DataRef, Overlong

_SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
_PROGRESS_RECORDS = 256


class GuessedSamples:
    """Samples of which only lengths are known.

    Args:
        lengths: tokens of each sample, int32 [n].
        begins: its tokens before the first trained one, int32 [n].
        ends: its tokens up to the last trained one, that included, int32 [n].
        trained: its tokens that carry loss, int32 [n].
    """

    def __init__(self, lengths: Ints, begins: Ints, ends: Ints, trained: Ints) -> None:
        self.lengths, self.trained = lengths, trained
        self._begins, self._ends = begins, ends

    def __len__(self) -> int:
        return len(self.lengths)

    def trainable(self) -> tuple[Ints, Ints]:
        """Of each sample, the tokens that go through the model and those whose successor is trained, int32 [n] each."""
        # A first token has nothing before it that could predict it.
        trained = np.where(self._begins == 0, np.maximum(self.trained - 1, 0), self.trained)
        return np.where(trained > 0, np.maximum(self._ends - 1, 0), 0).astype(np.int32), trained.astype(np.int32)

    def limited(self, max_seq_len: int, overlong: Overlong) -> GuessedSamples:
        """The samples with longer ones dropped or cut; those of which no trained token remains are left out.

        Of a sample that is cut, trained tokens are taken to lie evenly between its first and its last one.
        """
        longer = self.lengths > max_seq_len
        if overlong == "drop":
            return self._chosen(~longer)
        ends = np.minimum(self._ends, max_seq_len)
        spans = np.maximum(self._ends - self._begins, 1)
        share = np.clip((ends - self._begins) / spans, 0.0, 1.0)
        cut = GuessedSamples(
            np.minimum(self.lengths, max_seq_len).astype(np.int32),
            self._begins,
            ends.astype(np.int32),
            np.ceil(self.trained * share).astype(np.int32),
        )
        return cut._chosen(~longer | (cut.trained > 0))

    def _chosen(self, which: Flags) -> GuessedSamples:
        return GuessedSamples(self.lengths[which], self._begins[which], self._ends[which], self.trained[which])


class GuessedData(msgspec.Struct, frozen=True):
    """Samples with estimated lengths, split as those with tokens are."""

    train: GuessedSamples
    held_out: GuessedSamples
    notes: tuple[str, ...]
    """What the user should know, as sentences without a full stop."""
    counts: TokenCounts
    """Of the training file, before the split."""


def guess_lengths(
    data: DataRef, weights: TokenWeights, *, sample_tokens: int = 0, progress: Progress | None = None
) -> GuessedData:
    """What `prepare` would find, as far as it can be told without a tokenizer.

    Args:
        data: which data, and how it is read.
        weights: how densely the model's tokenizer writes.
        sample_tokens: what its chat template puts into every conversation beside the turns.
        progress: told how far the file is read.

    Raises:
        BadInput: a file is missing or broken; no record is usable; nothing would be trained; no such template.
    """
    template = None if data.format == "text" else _stand_in(data)
    table = _Table(data, weights, sample_tokens)
    counts = table.read(RenderedFile(Path(data.path), data, template), progress)
    check_usable(counts, data)
    notes = reading_notes(data.path, counts)
    if data.eval_path is not None:
        held_out = _Table(data, weights, sample_tokens)
        held_counts = held_out.read(RenderedFile(Path(data.eval_path), data, template), progress)
        notes += reading_notes(data.eval_path, held_counts)
        train, tested = table.samples(table.usable()), held_out.samples(held_out.usable())
    else:
        usable = table.usable()
        in_train = split_samples(table.contents[usable], table.lines[usable], data.eval_fraction)
        train, tested = table.samples(usable[in_train]), table.samples(usable[~in_train])
    return GuessedData(train, tested, tuple(notes), counts)


def _stand_in(data: DataRef) -> ChatTemplate:
    """The template that was asked for, or ChatML, without a model behind it."""
    name = data.template or "chatml"
    text = BUILT_IN[name] if name in BUILT_IN else ChatTemplate.load(Path(data.path, "no model"), name).text
    template = ChatTemplate({"default": text}, _SPECIAL_TOKENS, name=name)
    day = datetime.date.fromisoformat(data.day) if data.day else datetime.date.today()
    return template.freeze_date(day) if template.uses_date else template


class _Table:
    """Lengths and keys of a file's samples, in the order of the file."""

    def __init__(self, data: DataRef, weights: TokenWeights, sample_tokens: int) -> None:
        self._weights, self._sample_tokens = weights, sample_tokens
        # What a stand-in has no place for, the model's own template may have.
        self._template_is_meant = data.template is not None
        self._rows: list[tuple[int, int, int, int, int, int]] = []
        self._values: np.ndarray[tuple[int, int], np.dtype[np.int64]] = np.zeros((0, 6), np.int64)

    def read(self, file: RenderedFile, progress: Progress | None) -> TokenCounts:
        """Adds every sample of a file."""
        for number, rendered in enumerate(file):
            self._rows += [self._row(item) for item in rendered]
            if progress is not None and number % _PROGRESS_RECORDS == 0:
                progress(file.reader.bytes_read, file.reader.total_bytes)
        self._values = np.array(self._rows, np.int64).reshape(-1, 6)
        with_loss = int(np.count_nonzero(self._values[:, 3]))
        # Whether the end of an answer is trained is a matter of the model's own template.
        counts = file.counts(samples=len(self._values), with_loss=with_loss, with_end=with_loss)
        return counts if self._template_is_meant else msgspec.structs.replace(counts, adapted={})

    def usable(self) -> Indices:
        """The samples that carry loss."""
        return np.flatnonzero(self._values[:, 3] > 0)

    def samples(self, indices: Indices) -> GuessedSamples:
        """The lengths of some samples."""
        lengths, begins, ends, trained = (self._values[indices, column].astype(np.int32) for column in range(4))
        return GuessedSamples(lengths, begins, ends, trained)

    @property
    def lines(self) -> Indices:
        """Line of the record that each sample comes from, int64 [n]."""
        return self._values[:, 4]

    @property
    def contents(self) -> Indices:
        """Equal for samples of equal text and spans, int64 [n]."""
        return self._values[:, 5]

    def _row(self, item: Rendered) -> tuple[int, int, int, int, int, int]:
        """length, begin, end, trained, line and content."""
        before = token_positions(item.text, self._weights)
        spans = item.spans if item.spans is not None else [(0, len(item.text))]
        written = sum(before[end] - before[begin] for begin, end in spans)
        trained = max(1, round(written)) if written else 0
        # The end-of-sequence token that follows a plain text is trained too.
        extra = 1 if item.plain else 0
        length = self._sample_tokens + max(1, round(before[-1])) + extra
        begin, end = (self._sample_tokens + round(before[place]) for place in (spans[0][0], spans[-1][1]))
        if item.spans is None:
            begin, end, trained = 0, length, length
        key = hashlib.blake2b(f"{item.spans} {item.text}".encode(errors="surrogatepass"), digest_size=8)
        content = int.from_bytes(key.digest(), "little", signed=True)
        return length, begin, min(end, length), min(trained, length), item.line, content
