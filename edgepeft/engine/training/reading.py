"""Samples of a run, read by their place in a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edgepeft.data.token_table import TokenTable
from edgepeft.engine.training.batches import Sample, read_samples
from edgepeft.errors import BadInput
from edgepeft.plan.workloads import Counts, with_leading


class SampleReader:
    """Reads one side of the data.

    Args:
        table: training or held-out samples, cut to the run's length.
        embeddings: rows of the model's embedding.
        path: the data file, for messages.
        leading_rows: tells how many rows are put before each sample, which the adapter that acts then fills; they
            carry no loss.
    """

    def __init__(
        self, table: TokenTable, embeddings: int, path: str, leading_rows: Callable[[], int] = lambda: 0
    ) -> None:
        self.table = table
        self._embeddings = embeddings
        self._path = path
        self._leading_rows = leading_rows

    def __len__(self) -> int:
        return len(self.table)

    def read(self, indices: Sequence[int]) -> list[Sample]:
        """The samples that have something to train.

        Raises:
            BadInput: one has a token without an embedding, which on a card would end the process.
        """
        samples = read_samples(self.table, indices)
        for sample in samples:
            if (largest := max(int(sample.ids.max()), int(sample.targets.max()))) >= self._embeddings:
                raise BadInput(
                    f"line {self.table.line(sample.number)} has token {largest}, and the model has {self._embeddings} "
                    "embeddings",
                    where=self._path,
                    hint="Use the tokenizer that belongs to the model's weights",
                )
        count = self._leading_rows()
        if not count:
            return samples
        return [sample._replace(ids=np.pad(sample.ids, (count, 0)), rows=sample.rows + count) for sample in samples]

    def trainable(self) -> tuple[Counts, Counts]:
        """Of each sample, the rows that go through the model and those whose successor is trained, [n] each."""
        tokens, trained = self.table.trainable()
        return with_leading(np.asarray(tokens, np.int64), self._leading_rows()), np.asarray(trained, np.int64)
