"""Packed rows hold each sample once, with the right positions, targets and cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from edgepeft.engine.training.batches import build_micro_batch, plan_micro_batches, read_samples
from edgepeft.memory.chunks import TOKEN_STEP


class Table:
    """Samples given by hand, in the place of a TokenTable."""

    def __init__(self, *samples: tuple[list[int], list[int]]) -> None:
        self._samples = samples

    def sample(self, index: int) -> tuple[Any, Any]:
        ids, mask = self._samples[index]
        return np.array(ids, np.int32), np.array(mask, np.bool_)


def read(*samples: tuple[list[int], list[int]]) -> list[Any]:
    table: Any = Table(*samples)
    return read_samples(table, range(len(samples)))


def test_rows_predict_the_next_token_and_the_useless_end_is_cut() -> None:
    (sample,) = read(([10, 11, 12, 13, 14, 15], [0, 0, 1, 1, 0, 0]))
    assert sample.ids.tolist() == [10, 11, 12]
    assert sample.rows.tolist() == [1, 2]
    assert sample.targets.tolist() == [12, 13]


def test_a_first_token_cannot_be_predicted() -> None:
    (sample,) = read(([10, 11], [1, 1]))
    assert sample.rows.tolist() == [0]
    assert sample.targets.tolist() == [11]


def test_samples_without_anything_to_learn_are_left_out() -> None:
    assert [sample.number for sample in read(([1, 2], [0, 0]), ([1, 2], [0, 1]), ([5], [1]))] == [1]


def test_a_packed_row_restarts_positions_and_shifts_rows() -> None:
    samples = read(([1, 2, 3], [0, 1, 1]), ([4, 5, 6, 7], [0, 0, 0, 1]))
    batch = build_micro_batch(samples, torch.device("cpu"), fill_up=False)
    assert batch.input_ids.tolist() == [[1, 2, 4, 5, 6]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2]]
    assert batch.padding == 0
    assert batch.rows.tolist() == [0, 1, 4]
    assert batch.targets.tolist() == [2, 3, 7]
    assert batch.lengths == [2, 3]
    assert batch.samples == [0, 1]


def test_a_row_is_filled_up_with_what_counts_as_one_more_sample() -> None:
    samples = read(([1, 2, 3], [0, 1, 1]), ([4, 5, 6, 7], [0, 0, 0, 1]))
    batch = build_micro_batch(samples, torch.device("cpu"))
    assert batch.input_ids.shape == batch.position_ids.shape == (1, TOKEN_STEP)
    assert batch.position_ids[0, 5:].tolist() == list(range(TOKEN_STEP - 5))
    assert batch.rows.tolist() == [0, 1, 4]
    assert (batch.lengths, batch.samples) == ([2, 3], [0, 1])
    assert batch.row_lengths == [2, 3, TOKEN_STEP - 5]
    assert len(set(batch.row_samples)) == 3


def test_a_full_row_has_no_padding() -> None:
    batch = build_micro_batch(read(([1] * (TOKEN_STEP + 1), [1] * (TOKEN_STEP + 1))), torch.device("cpu"))
    assert (batch.padding, batch.row_lengths, batch.row_samples) == (0, [TOKEN_STEP], [0])


def test_packing_keeps_every_sample_once_and_the_cap() -> None:
    samples = read(*[([1] * length, [0] + [1] * (length - 1)) for length in (9, 3, 5, 2, 40, 6)])
    groups = plan_micro_batches(samples, 10)
    assert sorted(sample.number for group in groups for sample in group) == list(range(6))
    assert all(len(group) == 1 or sum(len(sample.ids) for sample in group) <= 10 for group in groups)
    again = plan_micro_batches(samples, 10)
    assert [[sample.number for sample in group] for group in again] == [
        [sample.number for sample in group] for group in groups
    ]
