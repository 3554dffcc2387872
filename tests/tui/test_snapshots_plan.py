"""Pictures of the Plan screen, which must not change by themselves."""

from __future__ import annotations

from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input

from edgepeft_tui.app import EdgepeftApp
from edgepeft_tui.screens.plan import PlanScreen
from edgepeft_tui.widgets.choice_table import ChoiceTable
from planning import patch, settle

SIZES = [(120, 40), (80, 24), (60, 20)]


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    patch(monkeypatch)
    monkeypatch.setattr(Input, "cursor_blink", False)


async def open_plan(pilot: Pilot[Any], **what: Any) -> PlanScreen:
    app = pilot.app
    assert isinstance(app, EdgepeftApp)
    await app.go("plan", **what)
    await settle(app, pilot)
    screen = app.screen_stack[0]
    assert isinstance(screen, PlanScreen)
    return screen


@pytest.mark.parametrize("size", SIZES)
def test_a_plan(snap_compare: Any, size: tuple[int, int]) -> None:
    async def run_before(pilot: Pilot[Any]) -> None:
        await open_plan(pilot, model="smollm2-135m", data="/data/tickets.jsonl")

    assert snap_compare(EdgepeftApp(), terminal_size=size, run_before=run_before)


@pytest.mark.parametrize("size", SIZES)
def test_a_value_being_edited(snap_compare: Any, size: tuple[int, int]) -> None:
    async def run_before(pilot: Pilot[Any]) -> None:
        screen = await open_plan(pilot, model="llama-3.1-8b", data="/data/tickets.jsonl")
        screen.query_one(ChoiceTable).go_to("checkpointing")
        await pilot.press("e")
        await settle(screen._app, pilot)
        await pilot.press("down", "down")
        await settle(screen._app, pilot)

    assert snap_compare(EdgepeftApp(), terminal_size=size, run_before=run_before)


@pytest.mark.parametrize("size", SIZES)
def test_nothing_fits(snap_compare: Any, size: tuple[int, int]) -> None:
    async def run_before(pilot: Pilot[Any]) -> None:
        screen = await open_plan(pilot, model="llama-3.1-70b", data="/data/tickets.jsonl")
        assert screen.refusal is not None

    assert snap_compare(EdgepeftApp(), terminal_size=size, run_before=run_before)


def test_the_preview(snap_compare: Any) -> None:
    async def run_before(pilot: Pilot[Any]) -> None:
        screen = await open_plan(pilot, model="smollm2-135m", data="/data/tickets.jsonl")
        await pilot.press("p")
        await settle(screen._app, pilot)

    assert snap_compare(EdgepeftApp(), terminal_size=(100, 30), run_before=run_before)
