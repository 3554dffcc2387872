"""The learning-rate schedule, and when steps that are not finite end a run."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from edgepeft.engine.training.optimizer import FiniteWatch, learning_rate_at
from edgepeft.errors import EdgepeftError
from edgepeft.spec import Optimizer, Schedule


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_the_schedule_warms_up_and_decays(name: Any) -> None:
    settings, schedule = Optimizer(learning_rate=2.0), Schedule(name=name, warmup_fraction=0.1, final_fraction=0.1)
    rates = [learning_rate_at(step, 100, settings, schedule) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(2.0)
    later = rates[10:]
    assert all(a >= b for a, b in pairwise(later))
    assert rates[-1] == pytest.approx(2.0 if name == "constant" else 0.2, abs=0.03)
    assert learning_rate_at(0, 1, settings, schedule) == pytest.approx(2.0)


def test_an_fp16_scaler_may_overflow_until_its_scale_is_used_up() -> None:
    watch = FiniteWatch()
    for scale in (65536.0, 32768.0, 16384.0, 8192.0, 4096.0, 2048.0):
        assert not watch.accepts(1.0, math.inf, scale)
    assert watch.in_a_row == 0
    assert watch.accepts(1.0, 1.0, 1024.0)
    for _ in range(4):
        watch.accepts(1.0, math.inf, 1.0)
    with pytest.raises(EdgepeftError, match="gradient was not finite in 5"):
        watch.accepts(1.0, math.inf, 1.0)
