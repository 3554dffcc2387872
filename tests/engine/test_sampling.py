"""Sampling: distributions on small vectors, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from edgepeft.chat.protocol import Sampling, check_sampling
from edgepeft.engine.inference.sampling import Sampler, next_probabilities, penalise
from edgepeft.errors import UsageError

LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()


def kept(**changes: float) -> list[float]:
    sampling = Sampling(**({"temperature": 1.0, "top_p": 1.0} | changes))  # type: ignore[arg-type]
    return next_probabilities(LOGITS, sampling).tolist()


def test_without_filters_it_is_softmax() -> None:
    assert kept() == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=1e-6)


def test_temperature_sharpens() -> None:
    squares = [0.01, 0.16, 0.04, 0.09]
    assert kept(temperature=0.5) == pytest.approx([value / sum(squares) for value in squares], abs=1e-6)


def test_top_k_keeps_the_likeliest() -> None:
    assert kept(top_k=2) == pytest.approx([0, 0.4 / 0.7, 0, 0.3 / 0.7], abs=1e-6)
    assert kept(top_k=99) == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=1e-6)


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.35, [0, 1, 0, 0]),
        (0.65, [0, 0.4 / 0.7, 0, 0.3 / 0.7]),
        (0.75, [0, 0.4 / 0.9, 0.2 / 0.9, 0.3 / 0.9]),
        (0.95, [0.1, 0.4, 0.2, 0.3]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, expected: list[float]) -> None:
    assert kept(top_p=top_p) == pytest.approx(expected, abs=1e-6)


def test_min_p_is_relative_to_the_likeliest() -> None:
    assert kept(min_p=0.6) == pytest.approx([0, 0.4 / 0.7, 0, 0.3 / 0.7], abs=1e-6)


def test_filters_follow_each_other() -> None:
    # Of the top three, renormalised to 4/9, 3/9, 2/9, top-p 0.7 keeps two; min-p 0.8 then keeps the first alone.
    assert kept(top_k=3, top_p=0.7, min_p=0.8) == pytest.approx([0, 1, 0, 0], abs=1e-6)


def test_penalty_divides_positive_and_multiplies_negative() -> None:
    changed = penalise(torch.tensor([2.0, -2.0, 1.0]), torch.tensor([0, 1, 1]), 2.0)
    assert changed.tolist() == [1.0, -4.0, 1.0]


def test_draws_follow_the_distribution() -> None:
    sampler = Sampler(Sampling(temperature=1.0, top_p=1.0, top_k=3, seed=3), [])
    draws = torch.tensor([sampler.draw(LOGITS) for _ in range(4000)])
    shares = torch.bincount(draws, minlength=4) / 4000
    expected = torch.tensor([0, 4 / 9, 2 / 9, 3 / 9])
    assert shares[0] == 0
    assert torch.all((shares - expected).abs() < 4 * math.sqrt(0.25 / 4000))


def test_seed_decides_the_draws_and_rows_differ() -> None:
    def draws(seed: int, row: int = 0) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), [], row)
        return [sampler.draw(LOGITS) for _ in range(40)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert draws(1, row=1) != draws(1)
    assert draws(0, row=1) != draws(1, row=0)


def test_greedy_takes_the_likeliest_after_the_penalty() -> None:
    logits = torch.tensor([1.0, 3.0, 2.9])
    assert Sampler(Sampling(temperature=0.0), []).draw(logits) == 1
    penalised = Sampler(Sampling(temperature=0.0, repetition_penalty=2.0), [])
    assert [penalised.draw(logits) for _ in range(3)] == [1, 2, 1]


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 1.0},
        {"repetition_penalty": 0.0},
        {"max_new_tokens": 0},
        {"temperature": math.nan},
    ],
)
def test_impossible_values_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="out of range"):
        check_sampling(Sampling(**changes))  # type: ignore[arg-type]
