"""Points for charts: thinned as they come, fitted to a width, and round numbers beside them."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from edgepeft_tui.series import Curve, Thinned, fitted, round_ticks


@given(st.integers(0, 5000), st.sampled_from([2, 8, 64]))
def test_any_number_of_points_stays_within_its_limit_and_keeps_its_mean(count: int, limit: int) -> None:
    thinned = Thinned(((index, 3.0 * index) for index in range(count)), limit)
    curve = thinned.curve()
    assert len(curve.xs) <= limit
    assert len(curve.xs) >= min(count, limit // 2)
    assert list(curve.xs) == sorted(curve.xs)
    # Every mean lies on the line that all points lie on.
    assert all(math.isclose(y, 3.0 * x, abs_tol=1e-6) for x, y in zip(curve.xs, curve.ys, strict=True))
    if count:
        assert curve.xs[-1] >= (count - 1) * (1 - 2 / limit) - 1


def test_what_is_no_number_is_left_out() -> None:
    curve = Thinned([(1, math.nan), (2, 0.5), (3, math.inf), (4, None), (5, 0.25)]).curve()
    assert curve == Curve((2, 5), (0.5, 0.25))


@given(st.integers(0, 400), st.integers(3, 200))
def test_a_curve_fits_a_width_and_keeps_its_ends(count: int, places: int) -> None:
    curve = Curve(tuple(float(x) for x in range(count)), tuple(float(x * x) for x in range(count)))
    small = fitted(curve, places)
    assert len(small.xs) == len(small.ys) <= max(places, 0) or small is curve
    assert len(small.xs) <= max(count, places)
    if count > places:
        assert len(small.xs) <= places
        assert (small.xs[0], small.ys[0], small.xs[-1], small.ys[-1]) == (0, 0, count - 1, (count - 1) ** 2)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 9))
def test_ticks_are_few_and_inside(low: float, span: float, most: int) -> None:
    high = low + span
    ticks = round_ticks(low, high, most)
    assert len(ticks) <= most
    assert all(low - 1e-6 * span <= tick <= high + 1e-6 * span for tick in ticks)


def test_ticks_are_round() -> None:
    assert round_ticks(0, 900, 4) == [0, 500]
    assert [round(tick, 6) for tick in round_ticks(0.28, 2.5, 6)] == [0.5, 1.0, 1.5, 2.0, 2.5]
    assert round_ticks(3, 3, 5) == [3]
