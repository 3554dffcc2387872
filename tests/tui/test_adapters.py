"""The Adapters screen on libraries made of plain files; the long work is stood in for."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Button, Input, Static

from adapter_files import make_card, write_lora
from edgepeft.errors import BadInput
from edgepeft.library import store
from edgepeft.library.combine_text import Said
from edgepeft.library.store import import_adapter, publish, resolve_adapter
from edgepeft.processes import Progress
from edgepeft_tui import adapter_work
from edgepeft_tui import adapters as readings
from edgepeft_tui import app as ui
from edgepeft_tui.adapter_work import Outcome
from edgepeft_tui.adapters import read_library, read_newest
from edgepeft_tui.app import EdgepeftApp
from edgepeft_tui.readings import Machine
from edgepeft_tui.screens.adapters import AdaptersScreen
from edgepeft_tui.screens.dialogs import Choice, Reading
from edgepeft_tui.screens.form import Form
from edgepeft_tui.widgets.filter_line import FilterLine
from edgepeft_tui.widgets.lines import Lines
from read_only import make_read_only
from tui_driving import HOSTILE, drive, seen, settle, told

SIZES = {"model.layers.0.self_attn.q_proj": (4, 16, 16), "model.layers.1.self_attn.q_proj": (4, 16, 16)}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ui, "read_machine", lambda: Machine("a machine", ()))


@pytest.fixture
def library(tmp_path: Path, edgepeft_home: Path) -> Path:
    """alpha v1 to v3, beta v1, a broken one, and one without a card."""
    for seed, (name, loss) in enumerate((("alpha", 0.5), ("alpha", 0.4), ("alpha", 0.31), ("beta", 0.25))):
        folder = write_lora(tmp_path / f"{name}{seed}", SIZES, seed=seed)
        publish(folder, name, make_card(base="tiny", metrics={"eval_loss": loss, "train_samples": 10.0}))
    for name in ("broken", "foreign"):
        import_adapter(folder, name)
    (edgepeft_home / "adapters" / "broken" / "v1" / "adapter_config.json").write_text("{")
    return edgepeft_home / "adapters"


def screen(app: EdgepeftApp) -> AdaptersScreen:
    found = app.screen
    assert isinstance(found, AdaptersScreen)
    return found


def table(app: EdgepeftApp, name: str = "adapters") -> Lines:
    return screen(app).query_one(f"#{name}", Lines)


def work_said(app: EdgepeftApp) -> str:
    return str(screen(app).query_one("#work-pane", Static).render())


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (60, 20)])
def test_names_versions_and_what_is_damaged_are_seen(library: Path, size: tuple[int, int]) -> None:
    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        text = seen(app)
        for expected in ("alpha", "v3", "0.310", "beta", "foreign", "damaged", "Adapters · 4 · 1 damaged", "0.400"):
            assert expected in text, text
        assert [row.key for row in table(app).rows] == ["alpha", "beta", "broken", "foreign"]
        assert [row.key for row in table(app, "versions").rows] == ["alpha@v3", "alpha@v2", "alpha@v1"]

    drive(check, "f6", size=size)


def test_an_empty_library_says_what_to_do(edgepeft_home: Path) -> None:
    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        assert "No adapter yet" in seen(app)
        for key in ("enter", "space", "c", "o", "a", "d", "m", "x", "b", "delete", "v"):
            await pilot.press(key)
        await settle(app, pilot)
        assert isinstance(app.screen, AdaptersScreen)
        assert not (edgepeft_home / "adapters").exists()

    drive(check, "f6")


def test_a_library_that_cannot_be_read_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store, "library_names", refuse)

    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        assert "cannot be read" in seen(app)
        assert "Permission denied" in seen(app)

    drive(check, "f6")


def test_one_unreadable_folder_leaves_the_others(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = store.versions_of

    def refuse(name: str) -> list[int]:
        if name == "beta":
            raise PermissionError(13, "Permission denied")
        return read(name)

    monkeypatch.setattr(store, "versions_of", refuse)
    usable, broken = store.scan_library()
    assert [adapter.reference for adapter in usable] == ["alpha@v1", "alpha@v2", "alpha@v3", "foreign@v1"]
    assert any("Permission denied" in one.why for one in broken)

    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        rows = {row.key: row for row in table(app).rows}
        assert rows["beta"].trouble
        assert not rows["alpha"].trouble
        await pilot.press("down", "enter")
        await settle(app, pilot)

    drive(check, "f6")


def test_the_card_is_a_pane_on_a_wide_screen_and_else_a_dialog(library: Path) -> None:
    async def narrow(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        # The card of the row where the cursor is, though it is read only now.
        await pilot.press("down", "enter")
        await settle(app, pilot)
        assert isinstance(app.screen, Reading)
        text = seen(app)
        assert "beta@v1" in text
        assert "tiny, held in nf4" in text
        await pilot.press("escape")
        assert isinstance(app.screen, AdaptersScreen)

    async def wide(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        text = seen(app)
        for expected in ("tiny, held in nf4", "It adds or changes", "published v3"):
            assert expected in text
        await pilot.press("down", "down")
        await settle(app, pilot)
        assert "damaged:" in seen(app)
        await pilot.press("enter")
        assert app.focused is screen(app).query_one("#card")
        await pilot.press("escape")
        assert app.focused is table(app)

    drive(narrow, "f6", size=(80, 24))
    drive(wide, "f6", size=(140, 50))


def test_the_filter_takes_words_and_escape_shows_all_again(library: Path) -> None:
    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        await pilot.press("ctrl+f", *"tiny", "space", *"bet")
        assert [row.key for row in table(app).rows] == ["beta"]
        assert "1 of 4" in str(table(app).border_title)
        await pilot.press("enter")
        assert app.focused is table(app)
        await pilot.press("ctrl+f")
        assert screen(app).query_one("#filter", FilterLine).value == "tiny bet"
        await pilot.press("x")
        assert "Nothing matches" in seen(app)
        await pilot.press("escape")
        assert len(table(app).rows) == 4
        assert app.current_mode == "adapters"

    drive(check, "f6")


def test_marks_are_compared_and_chatted_with(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[tuple[str, Any]] = []

    async def go(self: EdgepeftApp, room: str, **what: Any) -> None:
        gone.append((room, what))

    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        monkeypatch.setattr(EdgepeftApp, "go", go)
        await pilot.press("c")
        await pilot.press("d")
        assert "mark them with space" in told(app)
        # The newest alpha and beta, then alpha's first version.
        await pilot.press("space", "space", "d")
        await settle(app, pilot)
        assert isinstance(app.screen, Reading)
        text = seen(app)
        for expected in ("alpha@v3", "beta@v1", "0.31", "0.25", "The same in both"):
            assert expected in text, text
        await pilot.press("escape", "c")
        await pilot.press("up", "up", "up", "v", "end", "space", "c")
        await settle(app, pilot)
        assert gone == [
            ("chat", {"adapter": "alpha@v3"}),
            ("chat", {"adapters": ["alpha@v3", "beta@v1"]}),
            ("chat", {"adapters": ["alpha@v3", "beta@v1", "alpha@v1"]}),
        ]
        await pilot.press("d")
        assert "Comparing takes two" in told(app)

    drive(check, "f6")


def test_another_screen_asks_for_an_adapter(library: Path) -> None:
    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        await app.go("adapters", adapter="foreign@v1")
        await settle(app, pilot)
        current = table(app).current
        assert current is not None
        assert current.key == "foreign"

    drive(check)


def test_rolling_back_makes_a_new_version_of_an_old_one(library: Path) -> None:
    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        await pilot.press("b")
        await pilot.pause()
        assert "nothing is lost" in seen(app)
        await pilot.press("end", "enter")
        await settle(app, pilot)
        assert "alpha@v4 is a copy of v1" in work_said(app)
        assert table(app, "versions").rows[0].key == "alpha@v4"
        await pilot.press("down", "b")
        await settle(app, pilot)
        assert "one version only" in told(app)

    drive(check, "f6")
    assert resolve_adapter("alpha").version == 4


def test_deleting_names_what_is_lost_and_asks(library: Path) -> None:
    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        await pilot.press("delete")
        await pilot.pause()
        assert isinstance(app.screen, Choice)
        assert "All 3 versions of alpha (v1, v2, v3;" in seen(app)
        assert isinstance(app.focused, Button)
        await pilot.press("enter")
        assert (library / "alpha" / "v3").exists()
        await pilot.press("v", "end", "delete")
        await pilot.pause()
        assert "alpha@v1 (" in seen(app)
        await pilot.press("right", "enter")
        await settle(app, pilot)
        assert "Removed alpha@v1" in work_said(app)
        assert not (library / "alpha" / "v1").exists()
        assert (library / "alpha" / "v2").exists()
        table(app).focus()
        await pilot.press("down", "down", "delete", "right", "enter")
        await settle(app, pilot)
        assert [row.key for row in table(app).rows] == ["alpha", "beta", "foreign"]

    drive(check, "f6")


def test_importing_checks_the_folder_first_and_loses_nothing_typed(library: Path, tmp_path: Path) -> None:
    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        await pilot.press("i")
        await pilot.pause()
        await pilot.press(*"/no", "enter")
        await pilot.pause()
        assert isinstance(app.screen, Form)
        assert "there is no such folder or file" in seen(app)
        app.screen.query_one("#path", Input).value = str(tmp_path / "beta3")
        await pilot.press("enter")
        await settle(app, pilot)
        assert "Imported as beta3@v1" in work_said(app)
        current = table(app).current
        assert current is not None
        assert current.key == "beta3"

    drive(check, "f6")


def test_a_form_shows_what_counts_and_starts_the_work(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Sequence[str], Mapping[str, str]]] = []

    def compose(references: Sequence[str], values: Mapping[str, str], progress: Progress) -> Outcome:
        asked.append((references, dict(values)))
        progress("adding", 0.5)
        if values["how"] == "dare":
            return Outcome((Said("mix@v1 = both"), Said("energy kept: 99 %"), Said("careful", True)))
        raise BadInput("the updates cancel each other", where=HOSTILE[:60])

    monkeypatch.setattr(adapter_work, "compose", compose)

    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        await pilot.press("space", "space", "o")
        await pilot.pause()
        form = app.screen
        assert isinstance(form, Form)
        assert not form.query_one("#row-density").display
        form.query_one("#name", Input).value = "No Name"
        await pilot.press("enter")
        assert "cannot be used as a name" in seen(app)
        form.query_one("#name", Input).value = "mix"
        form.query_one("#weight-1", Input).value = "much"
        await pilot.press("enter")
        assert "'much' is no number" in seen(app)
        form.query_one("#weight-1", Input).value = "0.3"
        await pilot.press("enter")
        await settle(app, pilot)
        assert "cancel each other" in work_said(app)
        assert "\x1b" not in seen(app)
        # What was typed is there again.
        await pilot.press("o")
        await pilot.pause()
        form = app.screen
        assert isinstance(form, Form)
        assert form.query_one("#weight-1", Input).value == "0.3"
        form.query_one("#how").focus()
        await pilot.press("right", "right", "right")
        assert form.query_one("#row-seed").display
        form.query_one("#density", Input).value = "0.7"
        await pilot.press("enter")
        await settle(app, pilot)
        for expected in ("mix@v1 = both", "energy kept: 99 %", "careful"):
            assert expected in work_said(app)
        assert asked[0][0] == ["alpha@v3", "beta@v1"]
        assert asked[0][1] == {"name": "mix", "weight-0": "0.5", "weight-1": "0.3", "how": "exact"}
        assert asked[1][1]["density"] == "0.7"
        await pilot.press("s")
        assert not screen(app).query_one("#work-pane").display

    drive(check, "f6")


def test_work_is_stopped_and_a_second_one_waits(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def merge(reference: str, values: Mapping[str, str], progress: Progress) -> Outcome:
        for count in range(1000):
            progress("merging layer", count / 1000)
            time.sleep(0.01)
        return Outcome(())

    monkeypatch.setattr(adapter_work, "merge", merge)

    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        await pilot.press("m")
        await pilot.pause()
        await pilot.press("enter")
        assert "nothing is named" in seen(app)
        form = app.screen
        assert isinstance(form, Form)
        form.query_one("#out", Input).value = str(library.parent / "merged")
        await pilot.press("enter")
        await pilot.pause(0.4)
        assert "merging layer" in work_said(app)
        assert " %" in work_said(app)
        await pilot.press("x")
        assert "one piece of work at a time" in told(app)
        await pilot.press("s")
        await settle(app, pilot)
        assert "stopped; nothing was kept" in work_said(app)
        await pilot.press("x")
        await pilot.pause()
        assert isinstance(app.screen, Form)

    drive(check, "f6")


def test_a_library_that_cannot_be_written_is_told(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        make_read_only(monkeypatch, library)
        await pilot.press("b", "enter")
        await settle(app, pilot)
        assert "no permission to write here" in told(app)
        await pilot.press("delete", "right", "enter")
        await settle(app, pilot)
        assert told(app).count("no permission to write here") == 2
        assert [row.key for row in table(app).rows] == ["alpha", "beta", "broken", "foreign"]

    drive(check, "f6")


def test_text_from_outside_is_never_markup(tmp_path: Path, edgepeft_home: Path) -> None:
    folder = write_lora(tmp_path / "a", SIZES)
    publish(folder, "a", make_card(base=HOSTILE, run=HOSTILE, notes=(HOSTILE,)))
    publish(folder, "b", make_card(base=HOSTILE))
    nasty = edgepeft_home / "adapters" / "[red]x[loss=1] \x1b[31m\u202e🦀"
    (nasty / "v1").mkdir(parents=True)

    async def check(app: EdgepeftApp, pilot: Pilot[str]) -> None:
        assert "[red]x[loss=1]" in seen(app)
        await pilot.press("down", "down")
        for key in ("space", "up", "space", "enter", "escape", "d", "escape", "o", "escape", "b", "delete", "escape"):
            await pilot.press(key)
            await settle(app, pilot)
            assert "\x1b" not in seen(app)
        assert "[/x] [loss=1]" in seen(app)

    drive(check, "f6")
    drive(check, "f6", size=(150, 40))


def test_a_version_is_read_again_only_when_its_files_changed(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read_newest("alpha")
    opened: list[str] = []
    real = store.open_adapter

    def count(*arguments: Any) -> Any:
        opened.append(arguments[1])
        return real(*arguments)

    monkeypatch.setattr(store, "open_adapter", count)
    assert read_newest("alpha") == first
    assert opened == []
    (library / "alpha" / "v3" / "card.json").write_text("{")
    broken = read_newest("alpha")
    assert broken is not None
    assert "not a readable card" in broken.trouble
    assert opened == ["alpha"]


def test_a_large_library_comes_in_parts(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "library_names", lambda: ["alpha"] * 1000)
    monkeypatch.setattr(readings, "_SECONDS", 0.0)
    parts = list(read_library())
    assert len(parts[0][0]) == 48
    assert [done for _, done in parts] == [False] * (len(parts) - 1) + [True]
    assert sum(len(rows) for rows, _ in parts) == 1000
