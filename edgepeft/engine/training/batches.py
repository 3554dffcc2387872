"""From samples to packed rows: which tokens go in, and which of their positions are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from edgepeft.data.packing import pack
from edgepeft.memory.chunks import in_token_steps

if TYPE_CHECKING:
    from edgepeft.data.token_table import TokenTable


class Sample(NamedTuple):
    """One sample as training needs it."""

    number: int
    """Its place in the table; seeds its dropout."""
    ids: np.ndarray
    """int32 [tokens]: cut behind the last token that predicts a trained one, since nothing later is learned from. Rows
    that the method fills come first, as zeros."""
    rows: np.ndarray
    """int64 [trained]: positions whose next token is trained."""
    targets: np.ndarray
    """int64 [trained]: that next token."""


_PADDING_NUMBER = -1
"""Stands where a sample's number does."""


class MicroBatch(NamedTuple):
    """Samples packed into one row, which padding fills up to a multiple of `TOKEN_STEP`.

    Padding is computed like one more sample of which nothing is trained: no other sees it, no gradient comes from it.
    """

    input_ids: Tensor
    """int64 [1, tokens]."""
    position_ids: Tensor
    """int64 [1, tokens], from the first one again in each sample and in the padding."""
    rows: Tensor
    """int64 [trained]: positions in the row whose next token is trained."""
    targets: Tensor
    """int64 [trained]."""
    lengths: list[int]
    """Tokens of each sample, in order."""
    samples: list[int]
    """Index of each sample in its table, in order."""
    padding: int = 0
    """Tokens behind the last sample."""

    @property
    def row_lengths(self) -> list[int]:
        """Tokens of each sample, and of the padding."""
        return [*self.lengths, self.padding] if self.padding else self.lengths

    @property
    def row_samples(self) -> list[int]:
        """What seeds the dropout of each of `row_lengths`."""
        return [*self.samples, _PADDING_NUMBER] if self.padding else self.samples


def read_samples(table: TokenTable, indices: Sequence[int]) -> list[Sample]:
    """The samples at `indices` that have something to train; the others could not change anything."""
    samples = []
    for index in indices:
        ids, mask = table.sample(index)
        # The first token has nothing before it that could predict it.
        rows = np.flatnonzero(mask[1:])
        if rows.size:
            targets = ids[rows + 1].astype(np.int64)
            samples.append(Sample(index, ids[: int(rows[-1]) + 1], rows.astype(np.int64), targets))
    return samples


def plan_micro_batches(samples: Sequence[Sample], micro_batch_tokens: int) -> list[list[Sample]]:
    """How the samples of a step are packed; a pure function of them and the cap."""
    groups = pack([len(sample.ids) for sample in samples], micro_batch_tokens)
    return [[samples[index] for index in group] for group in groups]


def build_micro_batch(
    samples: Sequence[Sample], device: torch.device, *, fill_up: bool = True, first_position: int = 0
) -> MicroBatch:
    """One packed row on `device`.

    Args:
        samples: to pack, in this order.
        device: of the tensors.
        fill_up: whether padding is added; the own code of a model may look at a whole row.
        first_position: of each sample's first token; adapters may take the places before it.
    """
    lengths = [len(sample.ids) for sample in samples]
    padding = in_token_steps(sum(lengths)) - sum(lengths) if fill_up else 0
    filled = [*lengths, padding] if padding else lengths
    starts = np.cumsum([0, *lengths[:-1]])
    rows = np.concatenate([sample.rows + start for sample, start in zip(samples, starts, strict=True)])

    def place(values: np.ndarray) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return MicroBatch(
        input_ids=place(np.concatenate([*(sample.ids for sample in samples), np.zeros(padding, np.int32)])).unsqueeze(
            0
        ),
        position_ids=place(np.concatenate([first_position + np.arange(length) for length in filled])).unsqueeze(0),
        rows=place(rows),
        targets=place(np.concatenate([sample.targets for sample in samples])),
        lengths=lengths,
        samples=[sample.number for sample in samples],
        padding=padding,
    )
