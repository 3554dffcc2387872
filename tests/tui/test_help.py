"""F1: what the focused part is, and its keys as they are now."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from textual.pilot import Pilot

from edgepeft.settings import store_setting
from edgepeft_tui import app as ui
from edgepeft_tui.app import EdgepeftApp
from edgepeft_tui.readings import Machine, Shelves
from edgepeft_tui.screens.form import Form
from edgepeft_tui.screens.help import HelpScreen, help_of, tell_help
from tui_driving import drive, seen


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ui, "read_machine", lambda: Machine("a machine", ()))
    monkeypatch.setattr(ui, "read_shelves", lambda: Shelves((), (), ()))


def said(app: EdgepeftApp) -> str:
    console = Console(width=300, file=io.StringIO())
    console.print(tell_help(app.screen))
    return " ".join(str(console.file.getvalue()).split())  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [(80, 24), (60, 20)])
def test_the_focused_part_comes_first_then_its_screen(size: tuple[int, int]) -> None:
    store_setting("keys.adapters.compose", "f8")

    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        await pilot.press("f1")
        await pilot.pause()
        assert isinstance(app.screen, HelpScreen)
        assert "Every adapter by its name" in seen(app)
        assert "Scroll Left" not in seen(app)
        await pilot.press("end")
        await pilot.pause(0.5)
        assert "Every adapter by its name" not in seen(app)
        await pilot.press("f1")
        assert not isinstance(app.screen, HelpScreen)

        words = said(app)
        parts = ["Every adapter by its name", "Adapters shows the library", "f8 Make one", "f2 Machine"]
        places = [words.lower().find(part.lower()) for part in parts]
        assert -1 not in places
        assert places == sorted(places)

    drive(check, "f6", size=size)


def test_every_part_that_takes_the_focus_says_what_it_is() -> None:
    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        for key in ("f2", "f6", "f7"):
            await pilot.press(key)
            await pilot.pause()
            assert app.screen.focus_chain
            for widget in app.screen.focus_chain:
                assert help_of(widget), widget
            assert help_of(app.screen)

    drive(check, size=(140, 40))


def test_a_form_has_help_too() -> None:
    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        await pilot.press("i")
        await pilot.pause()
        assert isinstance(app.screen, Form)
        await pilot.press("f1")
        await pilot.pause()
        assert "Up, down and tab move" in seen(app)
        await pilot.press("escape")
        assert isinstance(app.screen, Form)

    drive(check, "f6")
