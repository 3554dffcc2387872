"""The app around its screens: where keys lead, what is asked before leaving, and what settings change."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from textual.message import Message
from textual.pilot import Pilot
from textual.widgets import Button

from edgepeft.paths import home
from edgepeft.settings import store_setting
from edgepeft_tui import app as ui
from edgepeft_tui.actions import AREAS, all_actions
from edgepeft_tui.app import EdgepeftApp
from edgepeft_tui.glyphs import ASCII, UNICODE, choose_glyphs, glyphs
from edgepeft_tui.readings import Machine, Row, Shelves
from edgepeft_tui.screens.dialogs import Choice
from edgepeft_tui.screens.jump import JumpScreen
from edgepeft_tui.widgets.shelf import Shelf

Check = Callable[[EdgepeftApp, Pilot[str]], Awaitable[None]]
RUNNING = Shelves((Row("a-1", "step 4/9", "running"),), (), ())


def drive(check: Check, size: tuple[int, int] = (100, 30)) -> EdgepeftApp:
    app = EdgepeftApp()

    async def run() -> None:
        async with app.run_test(size=size, notifications=True) as pilot:
            await app.workers.wait_for_complete()
            await pilot.pause()
            await check(app, pilot)

    asyncio.run(run())
    return app


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ui, "read_machine", lambda: Machine("a machine", ()))
    monkeypatch.setattr(ui, "read_shelves", lambda: Shelves((), (), ()))


def test_every_action_has_one_id_and_the_footer_at_most_seven() -> None:
    ids = [action.id for action in all_actions()]
    assert len(ids) == len(set(ids))
    for area, actions in AREAS.items():
        assert all(action.id.startswith(f"{area}.") for action in actions)
        assert sum(action.show for action in actions) <= (2 if area == "app" else 5)


def test_function_keys_go_to_rooms_and_escape_back() -> None:
    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        for key, room in (("f3", "plan"), ("f4", "train"), ("f5", "chat"), ("f6", "adapters"), ("f7", "settings")):
            await pilot.press(key)
            assert app.current_mode == room
        for room in ("adapters", "chat", "train", "plan", "home", "home"):
            await pilot.press("escape")
            assert app.current_mode == room

    drive(check)


def test_a_click_on_the_top_line_goes_there() -> None:
    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        await pilot.click("#top", offset=(20, 0))
        assert app.current_mode == "train"

    drive(check)


def test_jump_mode_focuses_what_its_letter_says() -> None:
    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        await pilot.press("ctrl+g")
        assert isinstance(app.screen, JumpScreen)
        await pilot.press("d")
        assert app.focused is app.screen.query_one("#models", Shelf)

    drive(check)


@pytest.mark.parametrize("size", [(40, 30), (100, 10)])
def test_a_terminal_too_small_says_so_and_recovers(size: tuple[int, int]) -> None:
    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        word = app.screen.query_one("#too-small")
        assert word.display
        assert not app.screen.query_one("#work").display
        await pilot.resize_terminal(100, 30)
        await pilot.pause()
        assert not word.display
        assert app.screen.query_one("#work").display

    drive(check, size)


def test_settings_change_keys_theme_glyphs_and_spacing() -> None:
    store_setting("keys.app.plan", "ctrl+n")
    store_setting("theme", "nord")
    store_setting("glyphs", "ascii")
    store_setting("spacing", "compact")

    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        assert app.theme == "nord"
        assert app.has_class("-compact")
        assert glyphs() is ASCII
        await pilot.press("f3")
        assert app.current_mode == "home"
        await pilot.press("ctrl+n")
        assert app.current_mode == "plan"

    try:
        drive(check)
    finally:
        assert choose_glyphs(False) is UNICODE


def test_a_broken_config_is_told_and_the_app_opens() -> None:
    home().config_file.parent.mkdir(parents=True, exist_ok=True)
    home().config_file.write_text("theme = [/x]\n")

    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        assert any("not valid settings" in toast.message for toast in app._notifications)

    drive(check)


def test_unknown_themes_and_actions_in_the_config_are_told() -> None:
    store_setting("theme", "[/x]")
    store_setting("keys.app.nothing", "f3")

    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        said = " ".join(toast.message for toast in app._notifications)
        assert "no theme '[/x]'" in said
        assert "app.nothing" in said

    drive(check)


def test_quitting_without_a_run_just_leaves() -> None:
    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        await pilot.press("ctrl+q")

    assert drive(check).return_value is None


def test_quitting_with_a_run_asks_and_leaves_it_running_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ui, "read_shelves", lambda: RUNNING)

    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        await pilot.press("ctrl+q")
        assert isinstance(app.screen, Choice)
        assert isinstance(app.focused, Button)
        assert app.focused.id == "leave"
        await pilot.press("escape")
        assert not isinstance(app.screen, Choice)
        await pilot.press("ctrl+q", "enter")

    said = drive(check).return_value
    assert said is not None
    assert "edgepeft runs attach a-1" in said


def test_the_palette_lists_actions_by_area() -> None:
    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        titles = [command.title for command in app.get_system_commands(app.screen)]
        assert "home: New" in titles
        assert "app: Jump" in titles
        assert "theme: edgepeft" in titles
        assert not any(title.startswith("train:") for title in titles)

    drive(check)


def test_a_look_at_the_machine_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the app tells its screen must not come back to it: it would be told for ever."""
    told = 0
    handle = EdgepeftApp._tell_room

    def count(app: EdgepeftApp, message: Message) -> None:
        nonlocal told
        told += 1
        handle(app, message)

    monkeypatch.setattr(EdgepeftApp, "_tell_room", count)

    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        for _ in range(5):
            await pilot.pause(0.02)

    drive(check)
    assert told < 10
