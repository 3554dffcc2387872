"""One data file as rendered samples: bad records are counted and passed over, whatever comes after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec

from edgepeft.data.conversation import RecordError
from edgepeft.data.encode import Rendered, render_record
from edgepeft.data.records import LARGE_RECORD_CHARS, BadRecord, Format, RecordReader
from edgepeft.data.template import ChatTemplate
from edgepeft.errors import BadInput
from edgepeft.spec import DataRef

_MAX_SHOWN = 3


class TokenCounts(msgspec.Struct, frozen=True):
    """What reading one file found; kept beside the cached tokens."""

    format: Format
    records: int
    """Usable records."""
    samples: int
    bad: int
    """Records that were skipped."""
    unit: str
    """What `line` counts: line or row."""
    first_bad: tuple[BadRecord, ...]
    """The first of them."""
    with_loss: int
    """Samples with at least one trained token."""
    with_end: int
    """Samples in which a token that ends an answer is trained."""
    large: tuple[int, ...]
    """Lines of records above a million characters."""
    adapted: dict[str, int]
    """What had to be changed to suit the template → samples."""


class RenderedFile:
    """The samples of a file, record by record, and what was found on the way.

    Args:
        path: the training or the held-out file of `data`.
        data: how it is read.
        template: None for plain text.

    Raises:
        BadInput: the file cannot be read, or not as the format that `data` names.
    """

    def __init__(self, path: Path, data: DataRef, template: ChatTemplate | None) -> None:
        self.reader = RecordReader(path, data.format, data.columns)
        self._path, self._data, self._template = path, data, template
        self._records = self._bad = 0
        self._first_bad: list[BadRecord] = []
        self._adapted: Counter[str] = Counter()
        self._large: list[int] = []

    def __iter__(self) -> Iterator[list[Rendered]]:
        """The samples of one usable record after the other.

        Raises:
            BadInput: the file is broken at some place, and nothing behind that can be read.
        """
        for record in self.reader:
            if isinstance(record, BadRecord):
                if record.fatal:
                    where = f"{self._path}:{record.line}"
                    raise BadInput(record.why, where=where, hint="Copy or export the file again")
                self._skip(record)
                continue
            try:
                rendered = render_record(record, self._template, self._data.train_on, system=self._data.system)
            except RecordError as refusal:
                self._skip(BadRecord(record.line, str(refusal)))
                continue
            self._records += 1
            if record.size >= LARGE_RECORD_CHARS and len(self._large) < _MAX_SHOWN:
                self._large.append(record.line)
            for item in rendered:
                self._adapted.update(item.notes)
            yield rendered

    def counts(self, *, samples: int, with_loss: int, with_end: int) -> TokenCounts:
        """What was found so far, with what only the tokens tell."""
        return TokenCounts(
            format=self.reader.format,
            records=self._records,
            samples=samples,
            bad=self._bad,
            unit=self.reader.detection.unit,
            first_bad=tuple(self._first_bad),
            with_loss=with_loss,
            with_end=with_end,
            large=tuple(self._large),
            adapted=dict(self._adapted),
        )

    def _skip(self, record: BadRecord) -> None:
        self._bad += 1
        if len(self._first_bad) < _MAX_SHOWN:
            self._first_bad.append(record)


def check_usable(counts: TokenCounts, data: DataRef) -> None:
    """Refuses a file that nothing can be learned from.

    Raises:
        BadInput: no record is usable, or no token would carry loss.
    """
    if counts.records == 0:
        first = counts.first_bad[0] if counts.first_bad else None
        where = f"{data.path}:{first.line}" if first else data.path
        raise BadInput(
            f"no usable record; the first one {first.why}" if first else "no usable record",
            where=where,
            hint="See all of them with `edgepeft data check FILE`",
        )
    if counts.with_loss == 0:
        raise BadInput(
            "no token would be trained: the loss mask is empty in every sample",
            where=data.path,
            hint="See what is rendered with `edgepeft data preview FILE`, or train on all tokens with --train-on all",
        )


def reading_notes(path: str, counts: TokenCounts) -> list[str]:
    """What the user should know about a file, as sentences without a full stop."""
    name = Path(path).name
    notes: list[str] = []
    if counts.bad:
        first = counts.first_bad[0]
        share = f"{counts.bad:,} of {counts.bad + counts.records:,} records of {name}"
        notes.append(f"{share} are skipped; the first, {counts.unit} {first.line}, {first.why}")
    unlearned = counts.samples - counts.with_loss
    if unlearned:
        notes.append(f"{unlearned:,} samples of {name} have no trained token and are left out")
    endless = counts.with_loss - counts.with_end
    if endless:
        notes.append(f"in {endless:,} of {counts.with_loss:,} samples of {name} no end of an answer is trained")
    for line in counts.large:
        notes.append(f"the record at {counts.unit} {line} of {name} is longer than a million characters")
    return notes + [f"{sentence} ({samples:,} samples of {name})" for sentence, samples in counts.adapted.items()]
