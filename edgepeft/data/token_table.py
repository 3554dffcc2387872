"""Tokenized samples in a memory-mapped Arrow file, and views of it.

Written with pyarrow alone: it is what `datasets` memory-maps with, and imports in a quarter of the time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepeft.spec import Overlong

Ints = np.ndarray[tuple[int], np.dtype[np.int32]]
Flags = np.ndarray[tuple[int], np.dtype[np.bool_]]
Indices = np.ndarray[tuple[int], np.dtype[np.int64]]
BATCH_SAMPLES = 1024
BATCH_TOKENS = 1 << 20


class TokenFile:
    """One memory-mapped file of samples; pages are read when a sample is, and belong to the system's cache."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        self._map = pyarrow.memory_map(str(path), "r")
        table = pyarrow.ipc.open_file(self._map).read_all()
        ids, masks = table["ids"].chunks, table["mask"].chunks
        self._ids = [(_offsets(chunk), chunk.values.to_numpy()) for chunk in ids]
        self._masks = [(_offsets(chunk), chunk.values.to_numpy().view(np.bool_)) for chunk in masks]
        self._starts = np.cumsum([0, *(len(chunk) for chunk in ids)])
        self.lengths: Ints = _column(table, "length", np.int32)
        self.trained: Ints = _column(table, "trained", np.int32)
        self.lines: Indices = _column(table, "line", np.int64)
        self.prompts: Indices = _column(table, "prompt", np.int64)
        """Equal for samples with equal tokens before the first trained one."""
        self.contents: Indices = _column(table, "content", np.int64)
        """Equal for samples with equal tokens and masks."""

    def __len__(self) -> int:
        return len(self.lengths)

    def trained_spans(self, indices: Indices, max_seq_len: int | None) -> tuple[Ints, Ints]:
        """How far each sample is trained, and on how much; see `TokenTable.trainable`."""
        last, count = np.zeros(len(indices), np.int32), np.zeros(len(indices), np.int32)
        chunk_of = np.searchsorted(self._starts, indices, side="right") - 1
        for chunk in np.unique(chunk_of):
            chosen = np.flatnonzero(chunk_of == chunk)
            offsets, flags = self._masks[chunk]
            places = np.flatnonzero(flags[offsets[0] : offsets[-1]]) + offsets[0]
            rows = indices[chosen] - self._starts[chunk]
            begin = offsets[rows].astype(np.int64)
            end = offsets[rows + 1].astype(np.int64)
            if max_seq_len is not None:
                end = np.minimum(end, begin + max_seq_len)
            # The first token has nothing before it that could predict it.
            below, within = np.searchsorted(places, begin + 1), np.searchsorted(places, end)
            count[chosen] = np.maximum(0, within - below)
            found = chosen[within > below]
            last[found] = (places[within - 1] - begin)[within > below]
        return last, count

    def tokens_before(self, indices: Indices, ends: Ints) -> Indices:
        """Which ids occur in samples, of each its first `ends` tokens: int64, in order, each once."""
        seen = np.zeros(0, np.bool_)
        chunk_of = np.searchsorted(self._starts, indices, side="right") - 1
        for chunk in np.unique(chunk_of):
            chosen = np.flatnonzero(chunk_of == chunk)
            offsets, values = self._ids[chunk]
            begin = offsets[indices[chosen] - self._starts[chunk]]
            # +1 where a sample begins and -1 where it ends: samples do not overlap.
            inside = np.zeros(len(values) + 1, np.int8)
            np.add.at(inside, begin, 1)
            np.add.at(inside, begin + ends[chosen], -1)
            found = np.unique(values[np.cumsum(inside[:-1], dtype=np.int8) > 0])
            if len(found) and int(found[-1]) >= len(seen):
                seen = np.concatenate([seen, np.zeros(int(found[-1]) + 1 - len(seen), np.bool_)])
            seen[found] = True
        return np.flatnonzero(seen)

    def sample(self, index: int) -> tuple[Ints, Flags]:
        """ids int32 [length] and mask bool [length]; read-only views into the file."""
        chunk = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = index - int(self._starts[chunk])
        offsets, values = self._ids[chunk]
        mask_offsets, flags = self._masks[chunk]
        return values[offsets[row] : offsets[row + 1]], flags[mask_offsets[row] : mask_offsets[row + 1]]


class TokenTable:
    """Samples of a `TokenFile`: all of them, one side of the held-out split, or cut to a length."""

    def __init__(
        self, file: TokenFile, indices: Indices, *, max_seq_len: int | None = None, truncated: int = 0, dropped: int = 0
    ) -> None:
        self._file = file
        self._indices = indices
        self._max_seq_len = max_seq_len
        self.truncated = truncated
        """Samples that `limited` cut."""
        self.dropped = dropped
        """Samples that `limited` left out."""
        self.lengths: Ints = file.lengths[indices]
        """Tokens of each sample, int32 [n]."""
        self.trained: Ints = file.trained[indices]
        """Tokens of each sample that carry loss, int32 [n]."""
        if max_seq_len is not None:
            for row in np.flatnonzero(self.lengths > max_seq_len):
                self.trained[row] = np.count_nonzero(file.sample(int(indices[row]))[1][:max_seq_len])
            self.lengths = np.minimum(self.lengths, max_seq_len).astype(np.int32)

    def __len__(self) -> int:
        return len(self._indices)

    def sample(self, index: int) -> tuple[Ints, Flags]:
        """ids int32 [length] and mask bool [length], read-only.

        Raises:
            IndexError: no such sample.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        ids, mask = self._file.sample(int(self._indices[index]))
        return ids[: self._max_seq_len], mask[: self._max_seq_len]

    def trainable(self) -> tuple[Ints, Ints]:
        """Of each sample, the tokens that go through the model and those whose successor is trained, int32 [n] each.

        What follows the last token that predicts a trained one teaches nothing and is left out; a sample without any
        has 0 and 0.
        """
        return self._file.trained_spans(self._indices, self._max_seq_len)

    def tokens(self) -> Indices:
        """Which ids occur in what is trained on, int64, in order, each once; the last trained token is among it."""
        last, trained = self.trainable()
        return self._file.tokens_before(self._indices, np.where(trained > 0, last + 1, 0).astype(np.int32))

    def line(self, index: int) -> int:
        """Line (in parquet: row) of the record that the sample comes from."""
        return int(self._file.lines[self._indices[index]])

    @property
    def prompts(self) -> Indices:
        """A key of each sample's tokens before the first trained one, int64 [n]."""
        return self._file.prompts[self._indices]

    @property
    def contents(self) -> Indices:
        """A key of each sample's tokens and mask, int64 [n]."""
        return self._file.contents[self._indices]

    def limited(self, max_seq_len: int, overlong: Overlong) -> TokenTable:
        """The table with no sample above `max_seq_len` tokens.

        `drop` leaves longer samples out. `truncate` keeps their beginning, and leaves out those of which no trained
        token remains: they would only cost time.

        Raises:
            ValueError: `max_seq_len` is below 1.
        """
        if max_seq_len < 1:
            raise ValueError(f"max_seq_len must be at least 1, not {max_seq_len}")
        longer = self.lengths > max_seq_len
        if overlong == "drop":
            kept = self._indices[~longer]
            return TokenTable(self._file, kept, max_seq_len=self._max_seq_len, dropped=int(longer.sum()))
        keep = np.ones(len(self), np.bool_)
        for row in np.flatnonzero(longer):
            keep[row] = bool(self.sample(int(row))[1][:max_seq_len].any())
        limit = max_seq_len if self._max_seq_len is None else min(max_seq_len, self._max_seq_len)
        return TokenTable(
            self._file,
            self._indices[keep],
            max_seq_len=limit,
            truncated=int((longer & keep).sum()),
            dropped=int((~keep).sum()),
        )


class TokenWriter:
    """Writes samples in record batches, so that memory stays flat whatever their number."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        self._arrow = pyarrow
        self._schema = pyarrow.schema(
            [
                ("ids", pyarrow.list_(pyarrow.int32())),
                ("mask", pyarrow.list_(pyarrow.uint8())),
                ("length", pyarrow.int32()),
                ("trained", pyarrow.int32()),
                ("line", pyarrow.int64()),
                ("prompt", pyarrow.int64()),
                ("content", pyarrow.int64()),
            ]
        )
        self._sink = pyarrow.OSFile(str(path), "wb")
        self._writer = pyarrow.ipc.new_file(self._sink, self._schema)
        self._rows: list[tuple[Ints, Flags, int, int, int]] = []
        self._tokens = 0

    def add(self, ids: Sequence[int], mask: Sequence[bool], line: int) -> None:
        """Appends one sample."""
        values = np.asarray(ids, np.int32)
        flags = np.asarray(mask, np.bool_)
        begin = int(flags.argmax()) if flags.any() else len(flags)
        prompt = _digest(values[:begin].tobytes())
        content = _digest(values.tobytes() + np.packbits(flags).tobytes())
        self._rows.append((values, flags, line, prompt, content))
        self._tokens += len(values)
        if len(self._rows) >= BATCH_SAMPLES or self._tokens >= BATCH_TOKENS:
            self._flush()

    def close(self, *, keep: bool) -> None:
        """Ends the file; with `keep` false what is still in memory is left out, since the file will be removed."""
        try:
            if keep:
                self._flush()
            self._writer.close()
        finally:
            self._sink.close()

    def _flush(self) -> None:
        if not self._rows:
            return
        arrow = self._arrow
        ids = [row[0] for row in self._rows]
        masks = [row[1].view(np.uint8) for row in self._rows]
        offsets = np.cumsum([0, *(len(item) for item in ids)], dtype=np.int32)
        columns = [
            arrow.ListArray.from_arrays(offsets, np.concatenate(ids)),
            arrow.ListArray.from_arrays(offsets, np.concatenate(masks)),
            np.diff(offsets),
            np.array([row[1].sum() for row in self._rows], np.int32),
            *(np.array([row[at] for row in self._rows], np.int64) for at in (2, 3, 4)),
        ]
        arrays = [column if isinstance(column, arrow.Array) else arrow.array(column) for column in columns]
        self._writer.write_batch(arrow.record_batch(arrays, schema=self._schema))
        self._rows.clear()
        self._tokens = 0


def _digest(content: bytes) -> int:
    import hashlib

    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def _offsets(chunk: Any) -> Ints:
    offsets: Ints = chunk.offsets.to_numpy()
    return offsets


def _column(table: Any, name: str, kind: type[np.generic]) -> Any:
    chunks: Iterable[Any] = table[name].chunks
    return np.concatenate([np.empty(0, kind), *(chunk.to_numpy() for chunk in chunks)]).astype(kind, copy=False)
