"""Live tensor bytes: born, viewed and gone."""

from __future__ import annotations

import torch

from edgepeft.engine.training.memory import LiveBytes


def test_live_bytes_count_what_lives() -> None:
    before = torch.zeros(1000)
    with LiveBytes(torch.device("cpu")) as counter:
        start = counter.live_bytes
        assert start >= before.nbytes
        kept = before + 1
        view = kept[10:]
        (kept * 2).sum()
        assert counter.live_bytes == start + kept.nbytes
        del kept
        assert counter.live_bytes == start + 4000
        del view
    assert counter.live_bytes == start
    assert 8000 <= counter.peak_bytes - start <= 8100
