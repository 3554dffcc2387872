"""What is in a data file: usable and bad records, repeats, lengths in tokens. One pass; only digests are kept."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import compress
from pathlib import Path

import msgspec

from edgepeft.data.conversation import RecordError
from edgepeft.data.encode import Rendered, render_record, tokenize
from edgepeft.data.records import LARGE_RECORD_CHARS, BadRecord, Detection, Record, RecordReader
from edgepeft.data.template import ChatTemplate
from edgepeft.data.tokens import Tokenizer
from edgepeft.spec import DataRef

_BATCH_SAMPLES = 256
_KEPT_PAIRS = 20
PERCENTILES = (50, 90, 99)


class Pair(msgspec.Struct, frozen=True):
    """Two records that belong together."""

    line: int
    """Line (in parquet: row) of the later one."""
    earlier: int
    """Line of the first one like it."""


class Bin(msgspec.Struct, frozen=True):
    """One bar of the length histogram."""

    low: int
    """Shortest length in it, in tokens."""
    high: int
    """Longest length in it, in tokens."""
    samples: int


class Lengths(msgspec.Struct, frozen=True):
    """How long samples are, in tokens."""

    mean: float
    percentiles: dict[str, int]
    """`p50`, `p90`, `p99`: so many percent of the samples are not longer."""
    longest: int
    longest_line: int
    """Line of the record with the longest sample."""
    histogram: tuple[Bin, ...]


class Survey(msgspec.Struct, frozen=True):
    """All that `data check` tells."""

    path: str
    detection: Detection
    records: int
    """Usable and bad ones."""
    usable: int
    bad: tuple[BadRecord, ...]
    """Every bad record."""
    empty: int
    """Bad records that lack what would be asked, or what would be learned."""
    duplicates: int
    """Records equal to an earlier one."""
    duplicate_pairs: tuple[Pair, ...]
    """The first of them."""
    conflicts: int
    """Records that answer an earlier one's question differently."""
    conflict_pairs: tuple[Pair, ...]
    """The first of them."""
    large: tuple[int, ...]
    """Lines of records above a million characters."""
    control_tokens: int
    """Records whose own text holds a control token of the model, which is then taken for the real one."""
    samples: int
    tokens: int
    trained_tokens: int
    """Tokens that carry loss."""
    with_end: int
    """Samples in which a token that ends an answer is trained."""
    lengths: Lengths | None
    """None when there is no sample."""
    adapted: dict[str, int]
    """What had to be changed to suit the template → samples."""


def survey(
    data: DataRef,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Survey:
    """Reads the whole training file of `data`, and tokenizes it without keeping the tokens.

    Raises:
        BadInput: the file cannot be read.
    """
    counting = _Counting(tokenizer, template)
    reader = RecordReader(Path(data.path), data.format, data.columns)
    waiting: list[Rendered] = []
    for record in reader:
        if isinstance(record, BadRecord):
            counting.bad.append(record)
            continue
        try:
            rendered = render_record(record, template, data.train_on, system=data.system)
        except RecordError as refusal:
            counting.bad.append(BadRecord(record.line, str(refusal)))
            continue
        counting.add_record(record)
        for item in rendered:
            counting.adapted.update(item.notes)
        waiting.extend(rendered)
        if len(waiting) >= _BATCH_SAMPLES:
            counting.add_samples(waiting)
            waiting.clear()
            if progress is not None:
                progress(reader.bytes_read, reader.total_bytes)
    counting.add_samples(waiting)
    return counting.result(data.path, reader.detection)


def draw_histogram(bins: Sequence[Bin], width: int) -> list[str]:
    """The histogram as lines of at most `width` characters: range, bar, count."""
    if not bins:
        return []
    labels = [f"{item.low:,}–{item.high:,}" for item in bins]
    counts = [f"{item.samples:,}" for item in bins]
    left, right = max(map(len, labels)), max(map(len, counts))
    room = max(8, width - left - right - 2)
    most = max(item.samples for item in bins)
    lines: list[str] = []
    for at, (item, label, count) in enumerate(zip(bins, labels, counts, strict=True)):
        # One very long sample among short ones would otherwise draw a screen of nothing.
        if not item.samples and at and not bins[at - 1].samples:
            lines[-1] = f"{'⋮':>{left}}"
            continue
        eighths = round(item.samples * room * 8 / most)
        if item.samples and not eighths:
            eighths = 1
        bar = "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]
        lines.append(f"{label:>{left}} {bar} {count}")
    return lines


class _Counting:
    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self.tokenizer = tokenizer
        self.stops = frozenset(tokenizer.stop_token_ids(template))
        self.control = tuple(tokenizer.decode([token]) for token in tokenizer.special_ids)
        self.bad: list[BadRecord] = []
        self.adapted: Counter[str] = Counter()
        self.usable = 0
        self.seen: dict[bytes, int] = {}
        self.asked: dict[bytes, int] = {}
        self.duplicates: list[Pair] = []
        self.conflicts: list[Pair] = []
        self.totals: Counter[str] = Counter()
        self.large: list[int] = []
        self.lengths: Counter[int] = Counter()
        self.longest = (0, 0)

    def add_record(self, record: Record) -> None:
        self.usable += 1
        if record.size >= LARGE_RECORD_CHARS:
            self.large.append(record.line)
        content = msgspec.json.encode([record.messages, record.tools, record.text])
        self.totals["control"] += any(token in _own_text(record) for token in self.control if len(token) > 2)
        first = self.seen.setdefault(_digest(content), record.line)
        if first != record.line:
            self.totals["duplicates"] += 1
            if len(self.duplicates) < _KEPT_PAIRS:
                self.duplicates.append(Pair(record.line, first))
        elif record.messages:
            asked = _digest(msgspec.json.encode([record.messages[:-1], record.tools]))
            earlier = self.asked.setdefault(asked, record.line)
            if earlier != record.line:
                self.totals["conflicts"] += 1
                if len(self.conflicts) < _KEPT_PAIRS:
                    self.conflicts.append(Pair(record.line, earlier))

    def add_samples(self, rendered: Sequence[Rendered]) -> None:
        for item in tokenize(rendered, self.tokenizer, self.stops):
            length = len(item.ids)
            self.lengths[length] += 1
            self.longest = max(self.longest, (length, -item.rendered.line))
            self.totals["tokens"] += length
            self.totals["trained"] += sum(item.mask)
            self.totals["with_end"] += not self.stops.isdisjoint(compress(item.ids, item.mask))

    def result(self, path: str, detection: Detection) -> Survey:
        samples = sum(self.lengths.values())
        return Survey(
            path=path,
            detection=detection,
            records=self.usable + len(self.bad),
            usable=self.usable,
            bad=tuple(self.bad),
            empty=sum(record.empty for record in self.bad),
            duplicates=self.totals["duplicates"],
            duplicate_pairs=tuple(self.duplicates),
            conflicts=self.totals["conflicts"],
            conflict_pairs=tuple(self.conflicts),
            large=tuple(self.large),
            control_tokens=self.totals["control"],
            samples=samples,
            tokens=self.totals["tokens"],
            trained_tokens=self.totals["trained"],
            with_end=self.totals["with_end"],
            lengths=summarize_lengths(self.lengths, -self.longest[1]) if samples else None,
            adapted=dict(self.adapted),
        )


def summarize_lengths(counts: Counter[int], longest_line: int) -> Lengths:
    """Percentiles (nearest rank) and a histogram with bars that double in width, from length → samples."""
    ordered = sorted(counts.items())
    total = sum(counts.values())
    percentiles = {}
    for percent in PERCENTILES:
        rank, reached = -(-total * percent // 100), 0
        for length, samples in ordered:
            reached += samples
            if reached >= rank:
                percentiles[f"p{percent}"] = length
                break
    bars: Counter[int] = Counter()
    for length, samples in ordered:
        bars[max(length - 1, 0).bit_length()] += samples
    histogram = tuple(
        Bin((1 << (power - 1)) + 1 if power else 0, 1 << power, bars[power])
        for power in range(min(bars), max(bars) + 1)
    )
    mean = sum(length * samples for length, samples in ordered) / total
    return Lengths(mean, percentiles, ordered[-1][0], longest_line, histogram)


def _own_text(record: Record) -> str:
    if record.text is not None:
        return record.text
    return "\n".join(message["content"] for message in record.messages)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()
