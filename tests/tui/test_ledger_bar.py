"""The stacked memory bar: its order, its signs, its budget line and its legend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rich.cells import cell_len

from edgepeft.units import GIB
from edgepeft_tui.glyphs import ASCII, choose_glyphs, glyphs
from edgepeft_tui.widgets.ledger_bar import (
    CATEGORIES,
    Ledger,
    category_name,
    category_sign,
    category_style,
    legend,
    stacked_bar,
)

HELD = {"saved activations": 4 * GIB, "frozen weights": 8 * GIB, "logits and loss": GIB}


@pytest.fixture
def ascii_signs() -> Iterator[None]:
    choose_glyphs(True)
    yield
    choose_glyphs(False)


def test_every_category_has_its_own_sign_colour_and_name() -> None:
    assert len({category_sign(category) for category in CATEGORIES}) == len(CATEGORIES)
    assert len({category_style(category) for category in CATEGORIES}) == len(CATEGORIES)
    assert len({category_name(category) for category in CATEGORIES}) == len(CATEGORIES)


def test_the_bar_stacks_in_one_order_and_shows_the_budget_and_the_doubt() -> None:
    bar = stacked_bar(Ledger(HELD, 20 * GIB, 0.1), 102).plain  # type: ignore[arg-type]
    assert cell_len(bar) == 102
    base, saved, logits = (category_sign(name) for name in ("frozen weights", "saved activations", "logits and loss"))
    assert bar == base * 40 + saved * 20 + logits * 5 + "+" * 6 + " " * 29 + glyphs().line + " " * 1


def test_a_bar_above_its_budget_goes_behind_the_line() -> None:
    bar = stacked_bar(Ledger(HELD, 6 * GIB), 130).plain  # type: ignore[arg-type]
    assert bar.index(glyphs().line) == 60
    assert " " not in bar


@pytest.mark.parametrize("width", [1, 8, 33])
def test_a_narrow_bar_is_as_wide_as_it_may(width: int) -> None:
    assert cell_len(stacked_bar(Ledger(HELD, None, 0.05), width).plain) == width  # type: ignore[arg-type]
    assert cell_len(stacked_bar(Ledger({}), width).plain) == width


def test_a_legend_keeps_the_largest_where_there_is_little_room() -> None:
    whole = legend(HELD, 80).plain  # type: ignore[arg-type]
    assert [word in whole for word in ("base 8.00", "activations 4.00", "logits 1.00")] == [True] * 3
    little = legend(HELD, 14, 1).plain  # type: ignore[arg-type]
    assert "base 8.00" in little
    assert "logits" not in little


def test_ascii_mode_draws_ascii(ascii_signs: None) -> None:
    assert glyphs() is ASCII
    assert stacked_bar(Ledger(HELD, 20 * GIB, 0.1), 60).plain.isascii()  # type: ignore[arg-type]
    assert legend(HELD, 60).plain.isascii()  # type: ignore[arg-type]
