"""The Settings screen: what it shows, what a change does at once, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import Input, OptionList

from edgepeft import paths
from edgepeft.paths import home
from edgepeft.settings import settings, store_setting
from edgepeft_tui import app as ui
from edgepeft_tui.actions import Action, all_actions
from edgepeft_tui.app import EdgepeftApp
from edgepeft_tui.glyphs import ASCII, choose_glyphs, glyphs
from edgepeft_tui.keys import judge_key
from edgepeft_tui.preferences import read_here, read_places
from edgepeft_tui.readings import Machine, Shelves
from edgepeft_tui.screens.dialogs import Choice
from edgepeft_tui.screens.form import Form
from edgepeft_tui.screens.settings import SettingsScreen
from edgepeft_tui.screens.settings_dialogs import KeyCatch, ThemePick
from edgepeft_tui.widgets.lines import Lines
from read_only import make_read_only
from tui_driving import HOSTILE, drive, seen, settle, told


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ui, "read_machine", lambda: Machine("a machine", ()))
    monkeypatch.setattr(ui, "read_shelves", lambda: Shelves((), (), ()))
    for name in ("THEME", "GLYPHS", "SPACING"):
        monkeypatch.delenv(f"EDGEPEFT_{name}", raising=False)


def row(app: EdgepeftApp, table: str, key: str) -> tuple[str, ...]:
    rows = app.screen.query_one(f"#{table}", Lines).rows
    return next(row.cells for row in rows if row.key == key)


async def go_to(app: EdgepeftApp, pilot: Pilot[str], table: str, key: str) -> None:
    lines = app.screen.query_one(f"#{table}", Lines)
    lines.focus()
    assert lines.move_to(key)
    await pilot.pause()


@pytest.mark.parametrize("size", [(80, 24), (130, 40), (60, 20)])
def test_settings_folders_keys_and_versions_are_shown(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    store_setting("budget", "20GiB")
    monkeypatch.setenv("EDGEPEFT_INTENT", "speed")

    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        assert row(app, "settings", "budget")[1:3] == ("20GiB", "config.toml")
        assert row(app, "settings", "intent")[1:3] == ("speed", "environment")
        assert row(app, "settings", "co2_grams_per_kwh")[2] == "default"
        assert row(app, "folders", "models")[1] == "not there"
        assert row(app, "folders", "settings")[1].endswith(" B")
        assert row(app, "keys", "adapters.filter")[:2] == ("adapters.filter", "ctrl+f")
        assert row(app, "here", "torch")[1][0].isdecimal()
        assert "20GiB" in seen(app)
        await pilot.press("k")
        await pilot.pause()
        assert "app.help" in seen(app)

    drive(check, "f7", size=size)


def test_a_theme_is_seen_while_moving_and_kept_on_enter() -> None:
    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        assert app.theme == "edgepeft"
        await pilot.press("enter")
        await pilot.pause()
        assert isinstance(app.screen, ThemePick)
        await pilot.press("home")
        await pilot.pause()
        first = sorted(app.available_themes)[0]
        assert app.theme == first
        await pilot.press("escape")
        assert app.theme == "edgepeft"
        assert settings().theme is None
        await pilot.press("enter", "down", "enter")
        await settle(app, pilot)
        assert app.theme == settings().theme != "edgepeft"
        assert row(app, "settings", "theme")[2] == "config.toml"
        await pilot.press("d")
        await pilot.pause()
        assert app.theme == "edgepeft"
        assert settings().theme is None

    drive(check, "f7")


def test_words_and_values_are_in_force_at_once() -> None:
    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        await go_to(app, pilot, "settings", "glyphs")
        await pilot.press("enter", "end", "enter")
        await settle(app, pilot)
        assert glyphs() is ASCII
        assert "> " in seen(app)
        await go_to(app, pilot, "settings", "spacing")
        await pilot.press("enter", "end", "enter")
        await settle(app, pilot)
        assert app.has_class("-compact")
        await go_to(app, pilot, "settings", "intent")
        await pilot.press("enter")
        await pilot.pause()
        assert app.screen.query_one(OptionList).option_count >= 4
        await pilot.press("enter")
        await go_to(app, pilot, "settings", "budget")
        await pilot.press("enter")
        await pilot.pause()
        assert isinstance(app.screen, Form)
        app.screen.query_one(Input).value = "20"
        await pilot.press("enter")
        await pilot.pause()
        assert "has no unit" in seen(app)
        app.screen.query_one(Input).value = "20GiB"
        await pilot.press("enter")
        await settle(app, pilot)
        assert settings().budget == "20GiB"
        await go_to(app, pilot, "settings", "gpu")
        await pilot.press("enter")
        await pilot.pause()
        app.screen.query_one(Input).value = HOSTILE
        await pilot.press("enter")
        await pilot.pause()
        assert isinstance(app.screen, Form)
        await pilot.press("escape")
        assert settings().gpu is None

    try:
        drive(check, "f7")
    finally:
        choose_glyphs(False)


def test_the_environment_comes_first_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPEFT_BUDGET", "8GiB")

    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        await go_to(app, pilot, "settings", "budget")
        await pilot.press("enter")
        await pilot.pause()
        app.screen.query_one(Input).value = "9GiB"
        await pilot.press("enter")
        await settle(app, pilot)
        assert "EDGEPEFT_BUDGET comes before it" in told(app)
        assert row(app, "settings", "budget")[1] == "8GiB"

    drive(check, "f7")


def test_a_key_is_caught_judged_kept_and_given_back() -> None:
    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        await go_to(app, pilot, "keys", "app.plan")
        await pilot.press("enter")
        await pilot.pause()
        assert isinstance(app.screen, KeyCatch)
        await pilot.press("f2")
        await pilot.pause()
        assert "app.home (Home) has it" in seen(app)
        await pilot.press("enter")
        assert isinstance(app.screen, KeyCatch)
        await pilot.press("f12", "enter")
        await settle(app, pilot)
        assert settings().keys == {"app.plan": "f12"}
        assert row(app, "keys", "app.plan")[:3] == ("app.plan", "f12", "f3")
        await pilot.press("f3")
        assert app.current_mode == "settings"
        await pilot.press("f12")
        assert app.current_mode == "plan"
        await pilot.press("escape", "enter", "backspace")
        await settle(app, pilot)
        assert settings().keys == {}
        await pilot.press("f3")
        assert app.current_mode == "plan"

    drive(check, "f7")


def test_what_is_said_of_a_key() -> None:
    mark = next(action for action in all_actions() if action.id == "adapters.mark")
    quit_ = next(action for action in all_actions() if action.id == "app.quit")
    assert "deliver it as tab" in judge_key("ctrl+i", mark, {}).refusal
    assert "move with it" in judge_key("down", mark, {}).refusal
    assert "adapters.chat (Chat)" in judge_key("c", mark, {}).refusal
    # A key that the other one gave up, and one that another screen has.
    assert not judge_key("c", mark, {"adapters.chat": "f8"}).refusal
    assert not judge_key("n", mark, {}).refusal
    assert "app.help" in judge_key("f1", mark, {}).refusal
    assert "home.new" in judge_key("n", quit_, {}).refusal
    assert "home.new" in judge_key("question_mark", quit_, {"home.new": "f8,?"}).refusal
    assert "tmux" in judge_key("ctrl+b", mark, {}).note
    for key in ("shift+enter", "ctrl+shift+a", "alt+x", "super+k", "ctrl+enter"):
        assert "do not deliver it" in judge_key(key, mark, {}).note
    assert "line of text" in judge_key("z", Action("chat.x", "f8", "x", "X", "X"), {}).note
    assert judge_key("f8", mark, {}).note == judge_key("ctrl+t", mark, {}).note == ""


def test_the_cache_is_cleared_after_a_question(edgepeft_home: Path) -> None:
    kept = edgepeft_home / "cache" / "tokens" / "a"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"x" * 2048)

    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        await pilot.press("c")
        await pilot.pause()
        assert isinstance(app.screen, Choice)
        assert "2.00 KiB" in seen(app)
        await pilot.press("enter")
        assert kept.exists()
        await pilot.press("c", "right", "enter")
        await settle(app, pilot)
        assert not kept.exists()
        assert row(app, "folders", "cache")[1] == "not there"

    drive(check, "f7")


def test_a_config_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        make_read_only(monkeypatch, home().config_file.parent)
        await go_to(app, pilot, "settings", "spacing")
        await pilot.press("enter", "end", "enter")
        await settle(app, pilot)
        assert "no permission to write here" in told(app)
        assert settings().spacing is None

    drive(check, "f7")


def test_a_broken_config_shows_why(edgepeft_home: Path) -> None:
    home().config_file.write_text("theme = [/x]\n")

    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        assert isinstance(app.screen, SettingsScreen)
        assert "not valid settings" in seen(app)
        await pilot.press("enter", "d", "k", "enter", "escape")
        assert home().config_file.read_text() == "theme = [/x]\n"

    drive(check, "f7")


def test_unreadable_folders_are_counted_and_nothing_is_imported(
    edgepeft_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (edgepeft_home / "models" / "good").mkdir(parents=True)
    (edgepeft_home / "models" / "good" / "file").write_bytes(b"x" * 10)
    (edgepeft_home / "models" / "locked").mkdir()
    (edgepeft_home / "models" / "link").symlink_to("/usr")
    real = Path.iterdir

    def refuse(self: Path) -> object:
        if self.name == "locked":
            raise PermissionError(13, "Permission denied")
        return real(self)

    monkeypatch.setattr(Path, "iterdir", refuse)
    places = {place.name: place for place in read_places()}
    assert places["models"].size == "10 B, 1 unreadable"
    assert places["models"].trouble
    assert paths.measure_size(edgepeft_home / "nothing") is None
    import sys

    before = "torch" in sys.modules
    assert dict(read_here())["torch"][0].isdecimal()
    assert ("torch" in sys.modules) == before


def test_text_from_outside_is_never_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPEFT_GPU", HOSTILE.replace("\x00", ""))
    store_setting("keys.app.plan", HOSTILE)

    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        assert "[/x] [loss=1]" in seen(app)
        await go_to(app, pilot, "settings", "gpu")
        await pilot.press("enter")
        await pilot.pause()
        assert "\x1b" not in seen(app)
        await pilot.press("escape")
        await go_to(app, pilot, "keys", "app.plan")
        await pilot.press("enter")
        await pilot.pause()
        assert isinstance(app.screen, KeyCatch)
        assert "\x1b" not in seen(app)

    drive(check, "f7")
