"""What a plan counts is what the training loop reads and packs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgepeft.data.schedule import step_samples
from edgepeft.data.token_table import TokenFile, TokenTable, TokenWriter
from edgepeft.engine.training.batches import plan_micro_batches, read_samples
from edgepeft.plan.workloads import StepList, largest_held_out, largest_micro_batches


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenTable:
    """Samples of every kind in several record batches, and only some of them chosen."""
    monkeypatch.setattr("edgepeft.data.token_table.BATCH_SAMPLES", 7)
    random = np.random.default_rng(3)
    writer = TokenWriter(tmp_path / "tokens.arrow")
    masks = [[0, 0], [1, 0, 0], [1], [0, 1], [1, 1, 1, 0], [0] * 30 + [1] + [0] * 9]
    masks += [(random.random(int(size)) < 0.4).tolist() for size in random.integers(1, 40, 50)]
    for line, mask in enumerate(masks):
        writer.add(list(range(len(mask))), [bool(flag) for flag in mask], line)
    writer.close(keep=True)
    return TokenTable(TokenFile(tmp_path / "tokens.arrow"), np.array([5, 4, 3, 2, 1, 0, *range(8, 50)], np.int64))


@pytest.mark.parametrize("limit", [None, 1, 2, 17, 100])
def test_counted_lengths_are_those_that_are_read(table: TokenTable, limit: int | None) -> None:
    view = table if limit is None else TokenTable(table._file, table._indices, max_seq_len=limit)
    tokens, trained = view.trainable()
    read = {sample.number: sample for sample in read_samples(view, range(len(view)))}
    for index in range(len(view)):
        assert tokens[index] == (len(read[index].ids) if index in read else 0)
        assert trained[index] == (len(read[index].targets) if index in read else 0)


@pytest.mark.parametrize("cap", [9, 40, 200])
def test_no_step_of_the_loop_exceeds_what_was_counted(table: TokenTable, cap: int) -> None:
    limited = table.limited(25, "truncate")
    tokens, trained = (counts.astype(np.int64) for counts in limited.trainable())
    found = largest_micro_batches(StepList(tokens, trained, 6, 16, 5), cap)
    made = set()
    for step in range(16):
        samples = read_samples(limited, step_samples(len(limited), 6, step, 5))
        for group in plan_micro_batches(samples, cap):
            lengths = [len(sample.ids) for sample in group]
            made.add((sum(lengths), max(lengths), sum(len(sample.targets) for sample in group)))
    assert {one[:3] for one in found} <= made
    assert all(any(all(np.greater_equal(one[:3], size)) for one in found) for size in made)
    held_out = largest_held_out(tokens, trained, cap, 10)
    first = plan_micro_batches(read_samples(limited, range(10)), cap)[0]
    assert any(one.tokens >= sum(len(sample.ids) for sample in first) for one in held_out)
