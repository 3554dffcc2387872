"""The Train screen, driven by recorded run folders."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from textual.pilot import Pilot
from textual.widgets import OptionList, Static

from edgepeft.data.prepare import fingerprint_file
from edgepeft.runs import launch
from edgepeft.runs.control import read_request
from edgepeft.runs.events_file import EventWriter
from edgepeft.runs.layout import RunFolder
from edgepeft.runs.lock import RunLock
from edgepeft.settings import store_setting
from edgepeft_tui import app as ui
from edgepeft_tui.app import EdgepeftApp
from edgepeft_tui.glyphs import choose_glyphs
from edgepeft_tui.readings import Machine, Shelves, listed_runs
from edgepeft_tui.screens import run_following
from edgepeft_tui.screens import train as train_screen
from edgepeft_tui.screens.dialogs import Ask, Choice, Pick, Reading
from edgepeft_tui.screens.train import TrainScreen
from edgepeft_tui.widgets.chart import Chart
from edgepeft_tui.widgets.run_figures import RunFigures
from edgepeft_tui.widgets.shelf import Shelf
from recorded_runs import (
    beginning,
    card_plan,
    damaged,
    ending,
    finished,
    killed_mid_line,
    out_of_memory_then_recovered,
    steps_between,
    ten_thousand_steps,
    two_runs,
    write_run,
)

Check = Callable[[EdgepeftApp, TrainScreen, Pilot[str]], Awaitable[None]]
HOSTILE = "[/x] [loss=1] \x1b[31mred\x07 \u202eabc 🦀 " + "n" * 10_000


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    listed_runs.cache_clear()
    monkeypatch.setattr(ui, "read_machine", lambda: Machine("a machine", ()))
    monkeypatch.setattr(ui, "read_shelves", lambda: Shelves((), (), ()))
    monkeypatch.setattr(train_screen, "CHOOSE_SECONDS", 0.01)
    monkeypatch.setattr(train_screen, "DRAW_SECONDS", 0.0)
    monkeypatch.setattr(run_following, "QUIET_SECONDS", 0.05)


def drive(check: Check, run: RunFolder | None = None, size: tuple[int, int] = (120, 40)) -> EdgepeftApp:
    """Opens the Train screen, waits until `run` is shown, and lets `check` look."""
    app = EdgepeftApp()

    async def go() -> None:
        async with app.run_test(size=size, notifications=True) as pilot:
            await app.go("train", **({"run": run.id} if run is not None else {}))
            screen = cast(TrainScreen, app.screen)
            if run is not None:
                await until(pilot, lambda: screen._view is not None and screen._view.id == run.id)
                await pilot.pause()
            await check(app, screen, pilot)

    asyncio.run(go())
    return app


async def until(pilot: Pilot[str], condition: Callable[[], object], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be"
        await pilot.pause(0.02)


def screen_text(app: EdgepeftApp) -> str:
    return "\n".join("".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips())


def figures(screen: TrainScreen) -> str:
    return str(screen.query_one(RunFigures).render())


def log_text(screen: TrainScreen) -> str:
    return str(screen.query_one("#events Static", Static).render())


def said(app: EdgepeftApp) -> str:
    return " | ".join(toast.message for toast in app._notifications)


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (120, 40), (180, 50)])
def test_a_finished_run_shows_its_figures_at_every_size(size: tuple[int, int]) -> None:
    run = finished()

    async def check(app: EdgepeftApp, screen: TrainScreen, pilot: Pilot[str]) -> None:
        await until(pilot, lambda: "net-triage-1" in screen_text(app))
        text = screen_text(app)
        assert "10.9 GiB measured, 11.1 GiB predicted (-1.8 %)" in text
        assert "held out 0.2970" in figures(screen)
        assert "net-triage@v1" in text
        assert screen.query_one("#memory").display is (size[0] >= 80)

    drive(check, run, size)


def test_out_of_memory_and_recovery_are_one_sentence() -> None:
    run = out_of_memory_then_recovered()

    async def check(app: EdgepeftApp, screen: TrainScreen, pilot: Pilot[str]) -> None:
        told = " ".join(log_text(screen).split())
        assert "Out of memory in step 88; micro-batch 4,096 → 2,048 tokens, step redone, nothing lost" in told
        assert told.count("Out of memory") == 1
        assert screen._view is not None
        assert screen._view.state.status == "lost"

    drive(check, run)


def test_a_run_killed_within_a_line_shows_the_steps_that_count() -> None:
    run = killed_mid_line()

    async def check(app: EdgepeftApp, screen: TrainScreen, pilot: Pilot[str]) -> None:
        view = screen._view
        assert view is not None
        assert (view.state.status, view.state.step) == ("lost", 77)
        assert view.curves.loss.xs == tuple(range(1, 78))
        assert "1 damaged line of events.jsonl skipped" in log_text(screen)
        assert "Space resumes it" in figures(screen)

    drive(check, run)


def test_ten_thousand_steps_are_as_many_points_as_the_chart_can_show() -> None:
    run = ten_thousand_steps()

    async def check(app: EdgepeftApp, screen: TrainScreen, pilot: Pilot[str]) -> None:
        view = screen._view
        assert view is not None
        assert 512 <= len(view.curves.loss.xs) <= 1024
        assert view.curves.loss.xs[-1] > 9_980
        assert len(view.log) == 200 or view.log[-1].text.startswith("Finished")
        begun = time.perf_counter()
        screen.query_one("#curve", Chart).render()
        assert time.perf_counter() - begun < 0.5

    drive(check, run)


def test_a_live_run_grows_while_it_is_watched_and_its_end_is_one_toast() -> None:
    run = write_run("live", card_plan(40), [*beginning(40), *steps_between(1, 9, 40)])

    async def check(app: EdgepeftApp, screen: TrainScreen, pilot: Pilot[str]) -> None:
        assert screen._view is not None
        assert screen._view.state.status == "running"
        assert "step  9 / 40" in figures(screen)
        with EventWriter(run.events_file) as writer:
            for event in steps_between(10, 40, 40):
                writer.write(event)
            await until(pilot, lambda: "step 40 / 40" in figures(screen))
            assert screen._view.curves.loss.xs[-1] == 40
            writer.write(ending(40, "live@v1"))
        lock.release()
        await until(pilot, lambda: screen._view is not None and not screen._view.state.alive)
        await pilot.pause(0.3)
        told = [toast.message for toast in app._notifications]
        assert len(told) == 1
        assert "live-1 finished as live@v1; peak 10.9 GiB measured, 11.1 GiB predicted (-1.8 %)" in told[0]

    with RunLock(run) as lock:
        drive(check, run)


def test_a_worker_that_says_nothing_is_shown_and_can_be_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run("deaf", card_plan(40), [*beginning(40), *steps_between(1, 9, 40)])
    ended: list[tuple[str, float]] = []

    def stop(run: RunFolder, timeout_seconds: float) -> Any:
        ended.append((run.id, timeout_seconds))
        from edgepeft.runs.state import RunState

        return RunState(status="lost", step=9)

    monkeypatch.setattr(launch, "stop", stop)

    async def check(app: EdgepeftApp, screen: TrainScreen, pilot: Pilot[str]) -> None:
        assert "the worker may hang. k ends it at once" in " ".join(figures(screen).split())
        await pilot.press("k")
        assert isinstance(app.screen, Choice)
        await pilot.press("enter")
        assert ended == []
        await pilot.press("k", "right", "enter")
        await until(pilot, lambda: ended)
        assert ended[0][0] == "deaf-1"
        assert ended[0][1] < 10

    with RunLock(run):
        drive(check, run)


def test_pause_and_stop_ask_the_worker_and_say_so() -> None:
    run = write_run("live", card_plan(40), [*beginning(40), *steps_between(1, 9, 40)])

    async def check(app: EdgepeftApp, screen: TrainScreen, pilot: Pilot[str]) -> None:
        await pilot.press("space")
        await until(pilot, lambda: read_request(run) == "pause")
        await pilot.press("s")
        await until(pilot, lambda: read_request(run) == "stop")
        await pilot.press("d")
        assert "s stops it" in said(app)
        assert run.path.is_dir()

    with RunLock(run):
        drive(check, run)


def test_changed_data_is_a_question_before_it_is_forced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = tmp_path / "[data].jsonl"
    data.write_text("one\n")
    plan = card_plan(40)
    ref = msgspec.structs.replace(plan.spec.recipe.data, path=str(data), fingerprint=fingerprint_file(data))
    recipe = msgspec.structs.replace(plan.spec.recipe, data=ref)
    plan = msgspec.structs.replace(plan, spec=msgspec.structs.replace(plan.spec, recipe=recipe))
    run = write_run("changed", plan, [*beginning(40), *steps_between(1, 9, 40)])
    data.write_text("two\n")
    resume, forced = launch.resume, []

    def resume_or_tell(run: RunFolder, max_seconds: float | None = None, *, force: bool = False) -> None:
        if force:
            forced.append(run.id)
        else:
            resume(run, max_seconds)

    monkeypatch.setattr(launch, "resume", resume_or_tell)

    async def check(app: EdgepeftApp, screen: TrainScreen, pilot: Pilot[str]) -> None:
        for keys in (["escape"], ["enter"], ["right", "enter"]):
            assert forced == []
            await pilot.press("space")
            await until(pilot, lambda: isinstance(app.screen, Choice))
            assert "[data].jsonl" in str(app.screen.query_one(".question", Static).render())
            await pilot.press(*keys)
        await until(pilot, lambda: forced == [run.id])

    drive(check, run)


def test_enter_and_a_second_click_ask_before_they_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    other, run = finished(), killed_mid_line()
    asked: list[str] = []
    monkeypatch.setattr(launch, "resume", lambda run, seconds, *, force: asked.append(run.id))

    async def check(app: EdgepeftApp, screen: TrainScreen, pilot: Pilot[str]) -> None:
        await until(pilot, lambda: screen.query_one("#runs", Shelf).option_count == 2)
        for _ in range(2):
            # The newer run is the first row.
            assert asked == []
            await pilot.click("#runs", offset=(6, 1))
            await until(pilot, lambda: screen._view is not None and screen._view.id == run.id)
        await until(pilot, lambda: isinstance(app.screen, Choice))
        await pilot.press("escape", "r", "enter")
        await until(pilot, lambda: isinstance(app.screen, Choice))
        assert asked == []
        await pilot.press("enter")
        await until(pilot, lambda: asked == [run.id])

    drive(check, other)


def test_a_run_whose_time_was_over_asks_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = msgspec.structs.replace(ending(40, "timed@v1"), step=9, ended_by="time")
    run = write_run("timed", card_plan(40), [*beginning(40), *steps_between(1, 9, 40), timed])
    given: list[float | None] = []
    monkeypatch.setattr(launch, "resume", lambda run, seconds, *, force: given.append(seconds))

    async def check(app: EdgepeftApp, screen: TrainScreen, pilot: Pilot[str]) -> None:
        assert "Space gives it more" in " ".join(figures(screen).split())
        await pilot.press("space")
        assert isinstance(app.screen, Ask)
        await pilot.press(*"90", "enter")
        await pilot.pause()
        assert "has no unit" in said(app) or "cannot read" in said(app)
        await pilot.press("space", *"2h", "enter")
        await until(pilot, lambda: given == [7200.0])

    drive(check, run)


def test_removing_asks_and_shows_the_next_run() -> None:
    keep, run = finished(), damaged()

    async def check(app: EdgepeftApp, screen: TrainScreen, pilot: Pilot[str]) -> None:
        await until(pilot, lambda: screen.query_one("#runs", Shelf).option_count == 2)
        await pilot.press("r", "end")
        await until(pilot, lambda: "is damaged" in figures(screen))
        assert screen.query_one("#runs", Shelf).selected_row.mark == "trouble"  # type: ignore[union-attr]
        await pilot.press("d")
        assert isinstance(app.screen, Choice)
        await pilot.press("enter")
        assert run.path.is_dir()
        await pilot.press("d", "right", "enter")
        await until(pilot, lambda: not run.path.exists())
        await until(pilot, lambda: screen._view is not None and screen._view.id == keep.id)

    drive(check)


def test_a_second_run_lies_over_the_first() -> None:
    first, _ = two_runs()

    async def check(app: EdgepeftApp, screen: TrainScreen, pilot: Pilot[str]) -> None:
        await until(pilot, lambda: len(screen._summaries) == 2)
        await pilot.press("o")
        assert isinstance(app.screen, Pick)
        await pilot.press("enter")
        await until(pilot, lambda: screen._overlay is not None)
        await pilot.pause()
        chart = screen.query_one("#curve", Chart)
        await until(pilot, lambda: len(chart.picture.lines) == 3)
        assert "second-1" in str(chart.border_title)
        assert chart.picture.lines[0].curve.xs[-1] == 400
        await pilot.press("o")
        assert "none" in str(app.screen.query_one(OptionList).get_option_at_index(0).prompt)
        await pilot.press("home", "enter")
        await until(pilot, lambda: screen._overlay is None and screen._view is not None)
        await until(pilot, lambda: len(chart.picture.lines) == 2)

    drive(check, first)


def test_one_key_goes_through_what_the_chart_shows() -> None:
    run = finished()

    async def check(app: EdgepeftApp, screen: TrainScreen, pilot: Pilot[str]) -> None:
        chart = screen.query_one("#curve", Chart)
        seen = []
        for _ in range(3):
            seen.append(str(chart.border_title).split(" (c)")[0])
            await pilot.press("c")
        assert seen == ["Loss", "Learning rate", "Gradient norm"]
        await pilot.resize_terminal(60, 20)
        await pilot.pause()
        await pilot.press("c")
        assert str(chart.border_title).startswith("Memory (c)")

    drive(check, run)


def test_log_samples_and_details_can_be_read() -> None:
    run = finished()

    async def check(app: EdgepeftApp, screen: TrainScreen, pilot: Pilot[str]) -> None:
        for key, text in (("l", "nothing to remark"), ("v", "connection_exhaustion"), ("i", "it fits")):
            await pilot.press(key)
            await until(pilot, lambda: isinstance(app.screen, Reading))
            assert text in str(app.screen.query_one(Static).render())
            await pilot.press("escape")

    drive(check, run)


def test_chat_goes_on_with_the_published_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished()
    went: list[tuple[str, dict[str, Any]]] = []

    async def go(room: str, **what: Any) -> None:
        went.append((room, what))

    async def check(app: EdgepeftApp, screen: TrainScreen, pilot: Pilot[str]) -> None:
        monkeypatch.setattr(app, "go", go)
        await pilot.press("t")
        assert went == [("chat", {"adapter": "net-triage@v1"})]

    drive(check, run)


def test_a_run_without_an_adapter_says_when_it_will_have_one() -> None:
    run = killed_mid_line()

    async def check(app: EdgepeftApp, screen: TrainScreen, pilot: Pilot[str]) -> None:
        await pilot.press("t")
        assert "has no adapter yet" in said(app)
        assert app.current_mode == "train"

    drive(check, run)


def test_without_runs_the_next_key_is_named() -> None:
    async def check(app: EdgepeftApp, screen: TrainScreen, pilot: Pilot[str]) -> None:
        await pilot.pause(0.2)
        assert "No run yet: n plans one" in screen_text(app)
        for key in ("space", "s", "k", "d", "o", "t", "l", "i", "v", "c"):
            await pilot.press(key)
        assert app.screen is screen
        await pilot.press("n")
        assert app.current_mode == "plan"

    drive(check)


def test_it_begins_with_a_run_that_trains() -> None:
    live = write_run("live", card_plan(40), [*beginning(40), *steps_between(1, 9, 40)])
    finished()

    async def check(app: EdgepeftApp, screen: TrainScreen, pilot: Pilot[str]) -> None:
        await until(pilot, lambda: screen._view is not None)
        assert screen._chosen == live.id
        assert str(screen.query_one("#runs").border_subtitle) == "2, 1 active"

    with RunLock(live):
        drive(check)


def test_text_from_outside_never_becomes_markup() -> None:
    from edgepeft.runs.events import Failed, SampleGenerated, Warned

    plan = card_plan(40)
    base = msgspec.structs.replace(plan.spec.recipe.base, model=HOSTILE)
    recipe = msgspec.structs.replace(plan.spec.recipe, base=base)
    plan = msgspec.structs.replace(plan, spec=msgspec.structs.replace(plan.spec, recipe=recipe))
    events = [
        *beginning(40),
        *steps_between(1, 9, 40),
        Warned(message=HOSTILE),
        SampleGenerated(step=9, prompt=HOSTILE, answer=HOSTILE),
        Failed(message=HOSTILE, exit_code=5),
    ]
    run = write_run("plain", plan, events)
    run.log_file.write_text(HOSTILE)
    hostile = run.path.with_name("[x] [loss=1] 🦀 \u202eabc")
    run.path.rename(hostile)

    async def check(app: EdgepeftApp, screen: TrainScreen, pilot: Pilot[str]) -> None:
        await pilot.pause(0.2)
        assert "[/x] [loss=1]" in figures(screen)
        text = screen_text(app)
        assert "[/x] [loss=1]" in text
        assert "\x1b" not in text
        for key in ("v", "i", "l"):
            await pilot.press(key)
            await until(pilot, lambda: isinstance(app.screen, Reading))
            assert "[/x] [loss=1]" in screen_text(app)
            await pilot.press("escape")
        await pilot.press("d")
        assert "[x] [loss=1]" in screen_text(app)

    drive(check, RunFolder(hostile))


def test_ascii_terminals_get_ascii_charts() -> None:
    store_setting("glyphs", "ascii")
    run = finished()

    async def check(app: EdgepeftApp, screen: TrainScreen, pilot: Pilot[str]) -> None:
        await until(pilot, lambda: screen.query_one("#curve", Chart).picture.lines)
        chart = str(screen.query_one("#curve", Chart).render())
        assert "*" in chart
        assert "o" in chart
        assert chart.isascii()
        assert figures(screen).isascii()
        assert log_text(screen).isascii()
        memory = str(screen.query_one("#memory", Chart).render())
        assert "=" in memory
        assert "-" in memory

    try:
        drive(check, run)
    finally:
        choose_glyphs(False)


def test_five_hundred_runs_open_at_once(edgepeft_home: Path) -> None:
    import os

    first = finished("many", 20)
    for number in range(2, 501):
        folder = first.path.with_name(f"many-{number}")
        folder.mkdir()
        for file in (first.plan_file, first.events_file):
            os.link(file, folder / file.name)

    async def check(app: EdgepeftApp, screen: TrainScreen, pilot: Pilot[str]) -> None:
        shelf = screen.query_one("#runs", Shelf)
        await until(pilot, lambda: shelf.option_count >= 50)
        assert shelf.option_count < 500 or screen._view is not None
        await until(pilot, lambda: shelf.option_count == 500)

    drive(check)
