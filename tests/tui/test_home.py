"""The Home screen, driven by recorded readings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from textual.widgets import Static

from edgepeft_tui import app as ui
from edgepeft_tui.app import EdgepeftApp
from edgepeft_tui.readings import Bar, Machine, Row, Shelves, read_machine, read_shelves
from edgepeft_tui.widgets.memory_bars import MemoryBars
from edgepeft_tui.widgets.shelf import Shelf

MACHINE = Machine(
    title="RTX 4090 · driver 580.82",
    bars=(
        Bar("VRAM", 5 << 30, 24 << 30, "gnome-shell 1.2 · edgepeft chat 3.9 · 62 °C · 181 W"),
        Bar("RAM", 9 << 30, 62 << 30, "disk 412 GiB free"),
    ),
)
SHELVES = Shelves(
    runs=(
        Row("db-triage-2", "step 412/900  loss 0.310  ETA 6 min 00 s", "running", "edgepeft runs attach db-triage-2"),
        Row("ads-long-1", "lost at step 77/900", "trouble", "edgepeft runs resume ads-long-1"),
    ),
    adapters=(Row("db-triage", "v3  LoRA 16  19.2 MiB", "plain", "edgepeft chat --adapter db-triage"),),
    models=(Row("smollm2-135m", "134.5 M  bf16 0.25 GiB", "plain", "edgepeft chat smollm2-135m"),),
)
HOSTILE = "[/x] [loss=1] \x1b[31mred\x07 \u202eabc 🦀 " + "n" * 10_000


def _drive(
    monkeypatch: pytest.MonkeyPatch,
    check: Callable[[EdgepeftApp, object], object],
    machine: Machine = MACHINE,
    shelves: Shelves = SHELVES,
    size: tuple[int, int] = (100, 30),
) -> None:
    monkeypatch.setattr(ui, "read_machine", lambda: machine)
    monkeypatch.setattr(ui, "read_shelves", lambda: shelves)

    async def run() -> None:
        app = EdgepeftApp()
        async with app.run_test(size=size, notifications=True) as pilot:
            await app.workers.wait_for_complete()
            await pilot.pause()
            result = check(app, pilot)
            if asyncio.iscoroutine(result):
                await result

    asyncio.run(run())


def _screen_text(app: EdgepeftApp) -> str:
    return "\n".join("".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips())


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (60, 20)])
def test_everything_that_exists_is_seen(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    def check(app: EdgepeftApp, pilot: object) -> None:
        text = _screen_text(app)
        for expected in ("RTX 4090", "5.0 / 24.0 GiB", "db-triage-2", "ads-long-1", "db-triage ", "smollm2-135m"):
            assert expected in text, text

    _drive(monkeypatch, check, size=size)


def test_keys_move_between_the_lists_and_name_the_next_command(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(app: EdgepeftApp, pilot: object) -> None:
        for key, command in (
            ("r", "runs attach db-triage-2"),
            ("a", "chat --adapter db-triage"),
            ("m", "chat smollm2"),
        ):
            await pilot.press(key)
            await pilot.press("home")
            await pilot.pause()
            assert command in str(app.screen.query_one("#next", Static).render())
        await pilot.press("r", "down")
        await pilot.pause()
        assert "runs resume ads-long-1" in str(app.screen.query_one("#next", Static).render())

    _drive(monkeypatch, check)


def test_an_empty_home_says_what_to_do_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(app: EdgepeftApp, pilot: object) -> None:
        assert "first run" in str(app.screen.query_one("#next", Static).render())

    _drive(monkeypatch, check, shelves=Shelves((), (), ()))


def test_a_refresh_keeps_the_highlighted_row(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(app: EdgepeftApp, pilot: object) -> None:
        shelf = app.screen.query_one("#runs", Shelf)
        await pilot.press("r", "down")
        await pilot.pause()
        assert shelf.selected_row is not None
        assert shelf.selected_row.key == "ads-long-1"
        newer = Row("new-1", "starting", "running", "edgepeft runs attach new-1")
        monkeypatch.setattr(
            ui, "read_shelves", lambda: Shelves((newer, *SHELVES.runs), SHELVES.adapters, SHELVES.models)
        )
        await pilot.press("ctrl+r")
        await app.workers.wait_for_complete()
        await pilot.pause()
        assert shelf.option_count == 3
        assert shelf.selected_row.key == "ads-long-1"

    _drive(monkeypatch, check)


def test_text_from_outside_never_becomes_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row(HOSTILE, HOSTILE, "trouble", HOSTILE)
    shelves = Shelves((row,), (row,), (row,), (HOSTILE,))
    machine = Machine(HOSTILE, (Bar("VRAM", 1 << 30, 2 << 30, HOSTILE),))

    async def check(app: EdgepeftApp, pilot: object) -> None:
        await pilot.press("r")
        await pilot.pause()
        text = _screen_text(app)
        assert "[/x] [loss=1]" in text
        assert "\x1b" not in text

    _drive(monkeypatch, check, machine=machine, shelves=shelves)


def test_a_full_memory_is_told_without_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(app: EdgepeftApp, pilot: object) -> None:
        lines = str(app.screen.query_one(MemoryBars).render()).splitlines()
        assert "░" not in lines[0]
        assert "24.0 / 24.0 GiB" in lines[0]

    _drive(monkeypatch, check, machine=Machine("x", (Bar("VRAM", 24 << 30, 24 << 30),)))


def test_the_real_machine_and_an_empty_home_are_read(edgepeft_home: Path) -> None:
    machine = read_machine()
    assert machine.title
    ram = next(bar for bar in machine.bars if bar.label == "RAM")
    assert 0 < ram.used_bytes <= ram.total_bytes
    shelves = read_shelves()
    assert shelves.runs == shelves.adapters == ()
    assert shelves.troubles == ()
    assert not (edgepeft_home / "runs").exists()
