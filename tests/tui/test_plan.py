"""The Plan screen: what is asked, what is shown, what a changed value does, and how a run is started."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input, OptionList, Static

from edgepeft.errors import DiskProblem, Interrupted
from edgepeft.memory.breakdown import Breakdown, Phase
from edgepeft.memory.dry_run import DryRun, DryRunRequest
from edgepeft.plan import verify as verifying
from edgepeft.runs import launch as launching
from edgepeft_tui import finds, starting
from edgepeft_tui.app import EdgepeftApp
from edgepeft_tui.finds import Found
from edgepeft_tui.plans import Question
from edgepeft_tui.screens.dialogs import Ask, Choice, Reading
from edgepeft_tui.screens.plan import PlanScreen
from edgepeft_tui.screens.plan_dialogs import Chooser, DataPreview, EditValue
from edgepeft_tui.widgets.choice_table import ChoiceTable
from edgepeft_tui.widgets.field import Field
from edgepeft_tui.widgets.ledger_bar import LedgerBar
from edgepeft_tui.widgets.others_list import OthersList
from planning import HOSTILE, drive, patch, screen_text, settle, told

DATA = "/data/tickets.jsonl"


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    patch(monkeypatch)


def row(screen: PlanScreen, what: str) -> Any:
    assert screen.view is not None
    return next(row for row in screen.view.rows if row.what == what)


async def edit(app: EdgepeftApp, screen: PlanScreen, pilot: Pilot[str], what: str, text: str) -> None:
    screen.query_one(ChoiceTable).go_to(what)
    await pilot.press("e")
    await settle(app, pilot)
    assert isinstance(app.screen, EditValue)
    app.screen.query_one(Input).value = text
    await pilot.press("enter")
    await settle(app, pilot)


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (60, 20)])
def test_a_plan_is_seen(size: tuple[int, int]) -> None:
    async def check(app: EdgepeftApp, screen: PlanScreen, pilot: Pilot[str]) -> None:
        text = screen_text(app)
        for expected in ("budget 22.0 GiB", "train step", "to spare", "precision", "52 samples", "ETA"):
            assert expected in text, text
        assert screen.view is not None
        assert screen.view.settled

    drive(check, size, model="smollm2-135m", data=DATA)


def test_a_model_that_is_here_is_planned_without_being_asked() -> None:
    async def check(app: EdgepeftApp, screen: PlanScreen, pilot: Pilot[str]) -> None:
        assert screen.query_one("#model", Field).value == "smollm2-135m"
        assert screen.view is not None
        assert screen.view.plan.data is None

    drive(check)


def test_a_value_is_edited_and_given_back_and_undone() -> None:
    async def check(app: EdgepeftApp, screen: PlanScreen, pilot: Pilot[str]) -> None:
        before = row(screen, "rank")
        await edit(app, screen, pilot, "rank", "64")
        assert (row(screen, "rank").value, row(screen, "rank").origin) == ("64", "user")
        assert screen.view is not None
        assert screen.view.plan.spec.recipe.method.rank == 64  # type: ignore[union-attr]
        await pilot.press("backspace")
        await settle(app, pilot)
        assert row(screen, "rank") == before
        await pilot.press("u")
        await settle(app, pilot)
        assert row(screen, "rank").value == "64"
        await pilot.press("u", "u")
        await settle(app, pilot)
        assert row(screen, "rank") == before
        assert "nothing to take back" in told(app)

    drive(check, model="smollm2-135m", data=DATA)


def test_the_bar_moves_while_a_value_is_typed_and_goes_back_with_escape() -> None:
    async def check(app: EdgepeftApp, screen: PlanScreen, pilot: Pilot[str]) -> None:
        bar = screen.query_one(LedgerBar)
        before = bar.ledger
        assert before is not None
        screen.query_one(ChoiceTable).go_to("micro-batch-tokens")
        await pilot.press("enter")
        await settle(app, pilot)
        assert isinstance(app.screen, EditValue)
        app.screen.query_one(Input).value = "1900"
        await settle(app, pilot)
        assert bar.ledger is not None
        assert bar.ledger.total_bytes < before.total_bytes
        assert "to spare" in str(app.screen.query_one("#effect", Static).render())
        app.screen.query_one(Input).value = "none of it"
        await settle(app, pilot)
        assert "no whole number" in str(app.screen.query_one("#effect", Static).render())
        await pilot.press("escape")
        await settle(app, pilot)
        assert bar.ledger == before
        assert screen.desk.question.values == {}

    drive(check, model="smollm2-135m", data=DATA)


def test_words_are_a_list_and_its_first_is_back_to_auto() -> None:
    async def check(app: EdgepeftApp, screen: PlanScreen, pilot: Pilot[str]) -> None:
        screen.query_one(ChoiceTable).go_to("checkpointing")
        await pilot.press("e")
        await settle(app, pilot)
        words = app.screen.query_one(OptionList)
        words.highlighted = 1
        await pilot.press("enter")
        await settle(app, pilot)
        assert row(screen, "checkpointing").origin == "user"
        await pilot.press("e")
        await settle(app, pilot)
        await pilot.press("home", "enter")
        await settle(app, pilot)
        assert row(screen, "checkpointing").origin == "auto"

    drive(check, model="smollm2-135m", data=DATA)


@pytest.mark.parametrize(
    ("what", "text", "word"),
    [("rank", "-3", "--rank"), ("learning-rate", "soon", "no number"), ("targets", "no_such_layer", "no_such_layer")],
)
def test_a_value_that_cannot_be_meant_is_told_and_changes_nothing(what: str, text: str, word: str) -> None:
    async def check(app: EdgepeftApp, screen: PlanScreen, pilot: Pilot[str]) -> None:
        before = screen.view
        await edit(app, screen, pilot, what, text)
        assert word in told(app)
        assert screen.view == before
        assert screen.desk.question.values == {}
        assert screen.refusal is None

    drive(check, model="smollm2-135m", data=DATA)


def test_a_method_has_its_settings_and_loses_those_of_another() -> None:
    async def check(app: EdgepeftApp, screen: PlanScreen, pilot: Pilot[str]) -> None:
        await edit(app, screen, pilot, "rank", "8")
        screen.set_value("method", "bottleneck")
        await settle(app, pilot)
        assert "has no rank" in told(app)
        assert row(screen, "method").value == "bottleneck"
        assert row(screen, "placement").words == ("houlsby", "pfeiffer", "parallel")
        await edit(app, screen, pilot, "reduction", "4")
        assert row(screen, "reduction").value == "4"
        screen.set_value("method", "")
        await settle(app, pilot)
        assert screen.desk.question.values == {}
        assert row(screen, "method").value == "lora"

    drive(check, model="smollm2-135m", data=DATA)


def test_what_does_not_fit_is_told_with_what_would_help_and_can_be_changed() -> None:
    async def check(app: EdgepeftApp, screen: PlanScreen, pilot: Pilot[str]) -> None:
        await edit(app, screen, pilot, "budget", "1GiB")
        assert screen.refusal is not None
        assert not screen.refusal.fits
        assert screen.refusal.ways
        text = screen_text(app)
        assert "more than the budget of 1.00 GiB" in text
        assert "What would help" in text
        bar = screen.query_one(LedgerBar).ledger
        assert bar is not None
        assert bar.budget_bytes is not None
        assert bar.total_bytes > bar.budget_bytes
        await pilot.press("ctrl+s")
        assert "more than the budget" in told(app)
        await edit(app, screen, pilot, "budget", "20GiB")
        assert screen.refusal is None
        assert screen.view is not None

    drive(check, model="llama-3.1-8b", data=DATA)


def test_a_runner_up_is_taken() -> None:
    async def check(app: EdgepeftApp, screen: PlanScreen, pilot: Pilot[str]) -> None:
        assert screen.view is not None
        others = screen.query_one(OthersList)
        at = next(number for number, other in enumerate(screen.view.others) if other.fits)
        other = screen.view.others[at]
        await pilot.press("o")
        others.highlighted = at
        await pilot.press("enter")
        await settle(app, pilot)
        assert screen.desk.question.values == other.changes

    drive(check, model="smollm2-135m", data=DATA)


def test_the_newest_question_wins() -> None:
    async def check(app: EdgepeftApp, screen: PlanScreen, pilot: Pilot[str]) -> None:
        for rank in range(1, 33):
            screen.set_value("rank", str(rank))
        await settle(app, pilot)
        assert row(screen, "rank").value == "32"
        assert screen.desk.question.values == {"rank": "32"}

    drive(check, model="smollm2-135m", data=DATA)


def test_a_bad_file_leaves_the_plan_that_was() -> None:
    async def check(app: EdgepeftApp, screen: PlanScreen, pilot: Pilot[str]) -> None:
        before = screen.view
        screen.show(data="/data/bad.jsonl")
        await settle(app, pilot)
        assert "no record can be used" in told(app)
        assert screen.query_one("#data", Field).value == DATA
        assert screen.view == before

    drive(check, model="smollm2-135m", data=DATA)


def test_models_and_files_are_chosen_by_typing(tmp_path: Path) -> None:
    (tmp_path / "a folder").mkdir()
    (tmp_path / "a folder" / "mine.jsonl").write_text("{}")
    (tmp_path / "a folder" / "mine.txt").write_text("")

    async def check(app: EdgepeftApp, screen: PlanScreen, pilot: Pilot[str]) -> None:
        await pilot.press("m")
        await settle(app, pilot)
        assert isinstance(app.screen, Chooser)
        assert app.screen.query_one(OptionList).option_count == 3
        await pilot.press(*"70b")
        await settle(app, pilot)
        assert app.screen.query_one(OptionList).option_count == 1
        await pilot.press("down", "enter")
        await settle(app, pilot)
        assert screen.desk.question.model == "llama-3.1-70b"
        await pilot.press("d")
        await settle(app, pilot)
        assert app.screen.query_one(OptionList).option_count >= 1
        app.screen.query_one(Input).value = str(tmp_path / "a f")
        await settle(app, pilot)
        await pilot.press("down", "enter")
        await settle(app, pilot)
        assert isinstance(app.screen, Chooser)
        assert app.screen.query_one(OptionList).option_count == 1
        await pilot.press("down", "enter")
        await settle(app, pilot)
        assert screen.desk.question.data == str(tmp_path / "a folder" / "mine.jsonl")

    drive(check)


def test_a_scan_is_asked_for_by_home() -> None:
    async def check(app: EdgepeftApp, screen: PlanScreen, pilot: Pilot[str]) -> None:
        await settle(app, pilot)
        assert isinstance(app.screen, Chooser)
        await pilot.press("down", "enter")
        await settle(app, pilot)
        assert screen.desk.question.model != "/disk/other"
        assert "no such model" in told(app)

    async def opened(app: EdgepeftApp, screen: Any, pilot: Pilot[str]) -> None:
        await check(app, app.screen_stack[0], pilot)  # type: ignore[arg-type]

    async def from_plan(app: EdgepeftApp, screen: PlanScreen, pilot: Pilot[str]) -> None:
        screen.show(scan=True)
        await opened(app, screen, pilot)

    drive(from_plan)


def test_the_data_is_previewed_with_the_mask_by_style_and_sign() -> None:
    async def check(app: EdgepeftApp, screen: PlanScreen, pilot: Pilot[str]) -> None:
        await pilot.press("p")
        await settle(app, pilot)
        assert isinstance(app.screen, DataPreview)
        text = screen_text(app)
        assert "6 of 20 tokens are trained" in text
        assert "⟦An·answer<|im_end|>⟧" in text
        assert "[/x]·What?" in text
        sample = app.screen.query_one("#sample", Static).visual
        assert sample is not None
        await pilot.press("right")
        await pilot.pause()
        assert "cannot be used" in screen_text(app)
        await pilot.press("escape")
        assert app.screen is screen

    drive(check, model="smollm2-135m", data=DATA)


def test_the_command_is_copied_and_shown_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[str] = []

    def copy(app: EdgepeftApp, text: str) -> str:
        copied.append(text)
        return "copied to the system clipboard"

    monkeypatch.setattr("edgepeft_tui.clipboard.copy_text", copy)

    async def check(app: EdgepeftApp, screen: PlanScreen, pilot: Pilot[str]) -> None:
        await edit(app, screen, pilot, "rank", "8")
        await pilot.press("c")
        await settle(app, pilot)
        assert isinstance(app.screen, Reading)
        assert copied == ["edgepeft train smollm2-135m /data/tickets.jsonl --rank 8 --name tickets"]
        assert "system clipboard" in told(app)

    drive(check, model="smollm2-135m", data=DATA)


def test_the_demo_is_filled_in_and_enter_starts_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[tuple[Any, str]] = []

    class Run:
        id = "demo-database-1"

    monkeypatch.setattr(launching, "launch", lambda plan, name: started.append((plan, name)) or Run())
    monkeypatch.setattr(starting, "doubt_now", lambda plan: "")

    async def check(app: EdgepeftApp, screen: PlanScreen, pilot: Pilot[str]) -> None:
        assert screen.desk.question == Question("smollm2-135m", "/demo/train.jsonl", {"precision": "nf4", "rank": "16"})
        assert app.focused is screen.query_one("#start")
        await pilot.press("enter")
        await settle(app, pilot)
        assert isinstance(app.screen, Ask)
        assert app.screen.query_one(Input).value == "demo-database"
        await pilot.press("enter")
        await settle(app, pilot)
        assert screen.view is not None
        assert started == [(screen.view.plan, "demo-database")]
        assert app.current_mode == "train"

    drive(check, demo=True)


def test_a_refused_start_is_told_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(plan: Any, name: str) -> Any:
        raise DiskProblem("1 MiB are free, and the run needs up to 9 GiB [/x]", where="/runs", hint="Free some space")

    monkeypatch.setattr(launching, "launch", launch)
    monkeypatch.setattr(starting, "doubt_now", lambda plan: "")

    async def check(app: EdgepeftApp, screen: PlanScreen, pilot: Pilot[str]) -> None:
        before = screen.view
        await pilot.press("ctrl+s")
        app.screen.query_one(Input).value = "No Good Name"
        await pilot.press("enter")
        await settle(app, pilot)
        assert "cannot be used as a name" in told(app)
        assert isinstance(app.screen, Ask)
        app.screen.query_one(Input).value = "mine"
        await pilot.press("enter")
        await settle(app, pilot)
        assert isinstance(app.screen, Reading)
        assert "Free some space" in screen_text(app)
        assert "[/x]" in screen_text(app)
        await pilot.press("escape")
        assert screen.view == before
        assert app.current_mode == "plan"

    drive(check, model="smollm2-135m", data=DATA)


def test_memory_that_is_gone_by_now_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    class Run:
        id = "mine-1"

    monkeypatch.setattr(launching, "launch", lambda plan, name: started.append(name) or Run())
    monkeypatch.setattr(starting, "doubt_now", lambda plan: "Only 2 GiB are free; a game holds 20.")

    async def check(app: EdgepeftApp, screen: PlanScreen, pilot: Pilot[str]) -> None:
        await pilot.press("ctrl+s", "enter")
        await settle(app, pilot)
        assert isinstance(app.screen, Choice)
        assert "a game holds 20" in screen_text(app)
        await pilot.press("right", "enter")
        await settle(app, pilot)
        assert started == ["tickets"]
        assert app.current_mode == "train"

    drive(check, model="smollm2-135m", data=DATA)


def test_starting_without_data_says_what_is_missing() -> None:
    async def check(app: EdgepeftApp, screen: PlanScreen, pilot: Pilot[str]) -> None:
        await pilot.press("ctrl+s")
        assert "needs a model and data" in told(app)

    drive(check, model="smollm2-135m")


def test_text_from_outside_never_becomes_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finds, "store_models", lambda: (Found(HOSTILE, HOSTILE), Found("x", HOSTILE, usable=False)))

    async def check(app: EdgepeftApp, screen: PlanScreen, pilot: Pilot[str]) -> None:
        screen.set_value("system", HOSTILE)
        screen.show(data=HOSTILE)
        await settle(app, pilot)
        assert "\x1b" not in screen_text(app)
        screen.query_one(ChoiceTable).go_to("system")
        await pilot.press("e")
        await settle(app, pilot)
        assert "[/x] [loss=1]" in screen_text(app)
        await pilot.press("escape", "m")
        await settle(app, pilot)
        assert "[/x] [loss=1]" in screen_text(app)
        await pilot.press("escape", "c")
        await settle(app, pilot)
        assert "[/x] [loss=1]" in screen_text(app)
        assert "\x1b" not in screen_text(app)
        await pilot.press("escape")
        screen.show(data="/bad/" + HOSTILE)
        await settle(app, pilot)
        await pilot.press("p")
        await settle(app, pilot)
        await pilot.press("right")
        await pilot.pause()
        assert "\x1b" not in screen_text(app)

    drive(check, model="smollm2-135m", data=DATA)


class SlowSimulator:
    """Answers when it is cancelled, or at once where `released` is set."""

    released = threading.Event()
    cancelled = False

    def __init__(self, say: Any = None) -> None:
        self._ended = threading.Event()

    def __enter__(self) -> SlowSimulator:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def cancel(self) -> None:
        SlowSimulator.cancelled = True
        self._ended.set()

    def dry_run(self, question: DryRunRequest) -> DryRun:
        while not self.released.is_set():
            if self._ended.wait(0.01):
                raise Interrupted("the dry run was cancelled")
        memory = Breakdown((Phase("train step", {"frozen weights": 3 << 30}),))
        return DryRun(memory, 30, (2, 3), 1.5, "2.13", "cpu")


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> type[SlowSimulator]:
    SlowSimulator.released.clear()
    SlowSimulator.cancelled = False
    monkeypatch.setattr(verifying, "Simulator", SlowSimulator)
    return SlowSimulator


def test_a_dry_run_is_told_beside_the_prediction(slow: type[SlowSimulator]) -> None:
    slow.released.set()

    async def check(app: EdgepeftApp, screen: PlanScreen, pilot: Pilot[str]) -> None:
        await pilot.press("v")
        await settle(app, pilot)
        assert screen.view is not None
        assert screen.view.plan.dry_run is not None
        assert "dry run 3.00" in screen_text(app)
        await pilot.press("v")
        await pilot.pause()
        assert isinstance(app.screen, Reading)
        assert "difference" in screen_text(app)

    drive(check, (120, 40), model="smollm2-135m", data=DATA)


def test_a_dry_run_runs_in_the_background_and_is_cancelled(slow: type[SlowSimulator]) -> None:
    async def check(app: EdgepeftApp, screen: PlanScreen, pilot: Pilot[str]) -> None:
        before = screen.view
        await pilot.press("v")
        for _ in range(5):
            await pilot.pause(0.02)
        assert screen.desk.busy
        assert "v cancels" in screen_text(app)
        await pilot.press("down", "up")
        await pilot.press("ctrl+s")
        assert "still being made" in told(app)
        await pilot.press("v")
        await settle(app, pilot)
        assert slow.cancelled
        assert "cancelled" in told(app)
        assert not screen.desk.busy
        assert screen.view == before
        assert not screen.desk.question.verify

    drive(check, model="smollm2-135m", data=DATA)


def test_a_changed_value_ends_the_dry_run_of_the_plan_before(slow: type[SlowSimulator]) -> None:
    async def check(app: EdgepeftApp, screen: PlanScreen, pilot: Pilot[str]) -> None:
        await pilot.press("v")
        for _ in range(5):
            await pilot.pause(0.02)
        screen.set_value("rank", "4")
        await settle(app, pilot)
        assert slow.cancelled
        assert row(screen, "rank").value == "4"

    drive(check, model="smollm2-135m", data=DATA)


def test_everything_that_is_known_is_told() -> None:
    async def check(app: EdgepeftApp, screen: PlanScreen, pilot: Pilot[str]) -> None:
        await pilot.press("n")
        await pilot.pause()
        assert isinstance(app.screen, Reading)
        assert "Plan for smollm2-135m" in screen_text(app)

    drive(check, model="smollm2-135m", data=DATA)


def test_data_that_is_chosen_first_waits_for_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finds, "store_models", lambda: ())

    async def check(app: EdgepeftApp, screen: PlanScreen, pilot: Pilot[str]) -> None:
        assert not screen.desk.busy
        assert screen.view is None
        assert "choose a base model" in screen_text(app)
        screen.show(model="smollm2-135m")
        await settle(app, pilot)
        assert screen.view is not None
        assert screen.view.plan.data is not None

    drive(check, data=DATA)


def test_what_cannot_be_read_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def demo() -> Any:
        raise DiskProblem("the disk is full", where="/cache", hint="Free some space")

    monkeypatch.setattr(finds, "demo_choice", demo)

    async def check(app: EdgepeftApp, screen: PlanScreen, pilot: Pilot[str]) -> None:
        await pilot.press("b")
        await settle(app, pilot)
        assert "the disk is full" in told(app)
        assert screen.view is not None

    drive(check, model="smollm2-135m", data=DATA)
