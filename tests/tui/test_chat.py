"""The Chat screen with a recorded client: streaming, stopping, swapping, comparing, keeping, and hostile answers."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import Input, OptionList

from chat_fakes import ADAPTERS, FakeClient, drive, install, screen_text, settle, toasts
from edgepeft.chat.archive import list_kept
from edgepeft.chat.conversation import read_stored
from edgepeft.errors import BadInput, EdgepeftError
from edgepeft_tui.app import EdgepeftApp
from edgepeft_tui.chat.choices import Start
from edgepeft_tui.screens import chat_deeds
from edgepeft_tui.screens.chat import ChatScreen
from edgepeft_tui.screens.chat_dialogs import ChooseAdapters, KeptDialog, SamplingDialog
from edgepeft_tui.widgets.answer import AnswerView
from edgepeft_tui.widgets.composer import Composer
from edgepeft_tui.widgets.lane_view import LaneView, Question
from edgepeft_tui.widgets.safe_markdown import SafeMarkdown

HOSTILE = (
    "[/x] [loss=1] \x1b[31mred\x07 \u202eabc 🦀 [link](https://evil.example) <https://evil.example> "
    "![pic](https://evil.example/p.png) <b onclick=x>html</b> &#27;[2J &#x202e;turned https://evil.example\n\n"
    "<script>alert(1)</script>\n\n[ref]: https://evil.example\n\n```\x1b]8;;x\ncode \x1b[2J\n```\n" + "n" * 10_000
)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    return install(monkeypatch)


async def say(app: EdgepeftApp, pilot: Pilot[str], text: str) -> None:
    app.screen.query_one(Composer).text = text
    await pilot.press("enter")
    await settle(app, pilot)


def drawn_answer(screen: ChatScreen) -> str:
    return "".join(part.source for part in screen.query(AnswerView).last().query(SafeMarkdown))


def test_nothing_is_started_until_something_is_asked(client: type[FakeClient]) -> None:
    async def check(app: EdgepeftApp, screen: ChatScreen, pilot: Pilot[str]) -> None:
        assert client.started == []
        assert "db-triage v3 ×1.0" in screen_text(app)
        client.answers = ["**Bold** words."]
        await say(app, pilot, "Hello?")
        assert client.started == ["Llama-3.1-8B nf4"]
        assert client.asked[0][0] == "user: Hello?"
        assert [use.folder for use in client.asked[0][1]] == [str(ADAPTERS[0].path)]
        assert drawn_answer(screen) == "**Bold** words."
        text = screen_text(app)
        assert "Bold words." in text
        assert "71.0 tok/s" in text
        await say(app, pilot, "Again")
        assert client.started == ["Llama-3.1-8B nf4"]
        assert "assistant: **Bold** words.\nuser: Again" in client.asked[1][0]

    drive(check)
    assert client.closed == 1


def test_a_default_that_is_not_in_the_store_is_only_named(monkeypatch: pytest.MonkeyPatch) -> None:
    client = install(monkeypatch, Start("smollm2-135m"))

    async def check(app: EdgepeftApp, screen: ChatScreen, pilot: Pilot[str]) -> None:
        assert screen.talk.setup is None
        assert "smollm2-135m" in screen_text(app)
        await say(app, pilot, "Hello?")
        assert client.started == ["smollm2-135m nf4"]

    drive(check)


def test_escape_stops_first_and_goes_back_then(client: type[FakeClient]) -> None:
    client.delay = 0.02
    client.answers = ["abcdefgh" * 500]

    async def check(app: EdgepeftApp, screen: ChatScreen, pilot: Pilot[str]) -> None:
        composer = screen.query_one(Composer)
        composer.text = "Count"
        await pilot.press("enter")
        await asyncio.sleep(0.4)
        await pilot.press(*"typed")
        await pilot.press("enter")
        assert "escape stops it" in toasts(app)
        await pilot.press("escape")
        await settle(app, pilot)
        assert app.current_mode == "chat"
        assert client.cancelled == 1
        kept = screen.talk.lane.last_answer
        assert kept is not None
        assert 0 < len(kept) < 4000
        assert drawn_answer(screen) == kept
        assert "stopped" in screen_text(app)
        # What was typed meanwhile is there still.
        assert composer.text == "typed"
        await pilot.press("escape")
        assert app.current_mode == "home"

    drive(check)


def test_new_lines_and_the_last_question(client: type[FakeClient]) -> None:
    async def check(app: EdgepeftApp, screen: ChatScreen, pilot: Pilot[str]) -> None:
        await pilot.press("a", "ctrl+t", "b", "enter")
        await settle(app, pilot)
        assert client.asked[0][0] == "user: a\nb"
        await pilot.press("up")
        composer = screen.query_one(Composer)
        assert composer.text == "a\nb"
        await pilot.press("escape")
        assert composer.text == ""
        assert app.current_mode == "chat"
        await pilot.press("up", "c", "enter")
        await settle(app, pilot)
        assert client.asked[1][0] == "user: a\nbc"
        assert [turn.content for turn in screen.talk.lane.conversation.turns] == ["a\nbc", "Yes."]
        assert len(screen.query(Question)) == len(screen.query(AnswerView)) == 1

    drive(check)


def test_another_answer_takes_the_place_of_the_last(client: type[FakeClient]) -> None:
    client.answers = ["first", "second"]

    async def check(app: EdgepeftApp, screen: ChatScreen, pilot: Pilot[str]) -> None:
        await say(app, pilot, "Hello?")
        screen.query_one(LaneView).focus()
        await pilot.press("r")
        await settle(app, pilot)
        assert client.asked[1][0] == "user: Hello?"
        assert screen.talk.lane.last_answer == "second"
        assert len(screen.query(AnswerView)) == 1
        assert drawn_answer(screen) == "second"

    drive(check)


def test_adapters_are_swapped_in_the_middle(client: type[FakeClient]) -> None:
    async def check(app: EdgepeftApp, screen: ChatScreen, pilot: Pilot[str]) -> None:
        await say(app, pilot, "one")
        await pilot.press("ctrl+n")
        await settle(app, pilot)
        await pilot.press("f8", "f8", "f9")
        await say(app, pilot, "two")
        await pilot.press("ctrl+l")
        await settle(app, pilot)
        await say(app, pilot, "three")
        uses = [[(use.folder, use.scale) for use in asked[1]] for asked in client.asked]
        assert uses == [[(str(ADAPTERS[0].path), 1.0)], [(str(ADAPTERS[1].path), 0.9)], []]
        answers = [turn.adapters for turn in screen.talk.lane.conversation.turns if turn.role == "assistant"]
        assert answers == [("db-triage@v3",), ("net-triage@v1=0.9",), ()]
        assert client.started == ["Llama-3.1-8B nf4"]
        assert "net-triage@v1=0.9" in screen_text(app)

    drive(check)


def test_several_adapters_with_strengths(client: type[FakeClient]) -> None:
    async def check(app: EdgepeftApp, screen: ChatScreen, pilot: Pilot[str]) -> None:
        await pilot.press("ctrl+f")
        assert isinstance(app.screen, ChooseAdapters)
        await pilot.press(*"polite", "space", "left", "left")
        app.screen.query_one(Input).value = "net"
        await pilot.pause()
        await pilot.press("space", "enter")
        await settle(app, pilot)
        assert screen.talk.lane.label == "polite v2 ×0.8 + net-triage v1 ×1.0"
        await pilot.press("ctrl+f", "up", "up", "up", "enter")
        await settle(app, pilot)
        assert screen.talk.lane.label == "base"

    drive(check)


def test_one_question_goes_to_every_lane(client: type[FakeClient]) -> None:
    client.answers = ["from base", "from db", "from polite", "on"]

    async def check(app: EdgepeftApp, screen: ChatScreen, pilot: Pilot[str]) -> None:
        await pilot.press("ctrl+o")
        assert isinstance(app.screen, ChooseAdapters)
        await pilot.press(*"polite", "space", "enter")
        await settle(app, pilot)
        views = list(screen.query(LaneView))
        assert [view.lane.label for view in views] == ["base", "db-triage v3 ×1.0", "polite v2 ×1.0"]
        await say(app, pilot, "Hello?")
        assert [view.lane.last_answer for view in views] == ["from base", "from db", "from polite"]
        text = screen_text(app)
        assert all(answer in text for answer in ("from base", "from db", "from polite"))
        # The middle lane goes on alone.
        views[1].focus()
        await pilot.pause()
        await pilot.press("ctrl+o")
        await settle(app, pilot)
        assert [lane.label for lane in screen.talk.lanes] == ["db-triage v3 ×1.0"]
        await say(app, pilot, "Go on")
        assert "assistant: from db" in client.asked[-1][0]

    drive(check, (120, 40))


def test_narrow_terminals_stack_the_lanes(client: type[FakeClient]) -> None:
    async def check(app: EdgepeftApp, screen: ChatScreen, pilot: Pilot[str]) -> None:
        screen.show(adapters=["net-triage"])
        await settle(app, pilot)
        first, second = screen.query(LaneView)
        assert first.region.x == second.region.x
        assert first.region.bottom <= second.region.y
        await pilot.resize_terminal(100, 30)
        await pilot.pause()
        assert first.region.y == second.region.y
        assert client.started == ["Llama-3.1-8B nf4"]

    drive(check, (60, 20))


def test_what_other_screens_ask_for(client: type[FakeClient]) -> None:
    async def check(app: EdgepeftApp, screen: ChatScreen, pilot: Pilot[str]) -> None:
        await say(app, pilot, "Hello?")
        await app.go("chat", adapter="polite")
        await settle(app, pilot)
        assert screen.talk.lane.label == "polite v2 ×1.0"
        assert screen.talk.lane.last_question == "Hello?"
        await app.go("chat", model="other")
        await settle(app, pilot)
        assert client.started == ["Llama-3.1-8B nf4", "other nf4"]
        assert client.closed == 1
        assert screen.talk.lane.last_question is None
        await app.go("chat", adapter="gone")
        await settle(app, pilot)
        assert "no adapter is called 'gone'" in toasts(app)
        assert screen.talk.lane.label == "base"

    drive(check)


def test_a_refusal_is_told_and_the_conversation_stays(client: type[FakeClient]) -> None:
    async def check(app: EdgepeftApp, screen: ChatScreen, pilot: Pilot[str]) -> None:
        client.fail_start = BadInput("needs 9 GiB of 4", where="[/x]", hint="Use --precision nf4")
        await say(app, pilot, "Hello?")
        assert "needs 9 GiB of 4" in screen_text(app)
        assert screen.talk.lane.last_question == "Hello?"
        client.fail_start = None
        screen.query_one(LaneView).focus()
        await pilot.press("r")
        await settle(app, pilot)
        assert screen.talk.lane.last_answer == "Yes."
        assert "needs 9 GiB" not in screen_text(app)

    drive(check)


def test_a_process_that_dies_keeps_what_it_said(client: type[FakeClient]) -> None:
    client.answers = ["half of it, and more", "whole"]

    async def check(app: EdgepeftApp, screen: ChatScreen, pilot: Pilot[str]) -> None:
        client.fail_answer = EdgepeftError("the process ended unexpectedly (code -9)", where="inference")
        await say(app, pilot, "Hello?")
        assert screen.talk.lane.last_answer == "half of it"
        assert "ended unexpectedly" in screen_text(app)
        client.fail_answer = None
        screen.query_one(LaneView).focus()
        await pilot.press("r")
        await settle(app, pilot)
        assert screen.talk.lane.last_answer == "whole"

    drive(check)


def test_text_from_a_model_opens_nothing_and_hides_nothing(client: type[FakeClient]) -> None:
    client.answers = [HOSTILE]
    client.together = 50

    async def check(app: EdgepeftApp, screen: ChatScreen, pilot: Pilot[str]) -> None:
        await say(app, pilot, HOSTILE[:300])
        assert screen.talk.lane.last_answer == HOSTILE
        lane = screen.query_one(LaneView)
        lane.focus()
        await pilot.press("home")
        await pilot.pause()
        text = screen_text(app)
        for seen in ("[/x] [loss=1]", "[link](https://evil.example)", "<script>alert(1)</script>", "<b onclick=x>"):
            assert seen in text.replace("\n", ""), text
        for strip in screen._compositor.render_strips():
            for segment in strip:
                assert "\x1b" not in segment.text
                assert "\u202e" not in segment.text
                assert segment.style is None or segment.style.link is None
                assert segment.style is None or "@click" not in segment.style.meta

    drive(check, (120, 40))


def test_conversations_are_kept_and_reopened(client: type[FakeClient], edgepeft_home: Path) -> None:
    async def check(app: EdgepeftApp, screen: ChatScreen, pilot: Pilot[str]) -> None:
        await say(app, pilot, "[/x] Hello?")
        (kept,) = list_kept()
        assert kept.path.parent == edgepeft_home / "conversations"
        assert (kept.model, kept.title, kept.adapters) == ("Llama-3.1-8B", "[/x] Hello?", ("db-triage@v3",))
        screen.query_one(LaneView).focus()
        await pilot.press("n")
        await settle(app, pilot)
        assert screen.talk.lane.last_question is None
        await pilot.press("ctrl+s")
        await pilot.pause(0.2)
        assert isinstance(app.screen, KeptDialog)
        assert "[/x] Hello?" in screen_text(app)
        await pilot.press("enter")
        await settle(app, pilot)
        assert screen.talk.lane.last_question == "[/x] Hello?"
        assert drawn_answer(screen) == "Yes."
        assert screen.talk.lane.context_tokens > 0
        await say(app, pilot, "More")
        assert len(read_stored(kept.path).turns) == 4
        await pilot.press("ctrl+s")
        await pilot.pause(0.2)
        await pilot.press("d")
        assert kept.path.exists()
        await pilot.press("d")
        assert not kept.path.exists()

    drive(check)


def test_a_conversation_is_written_to_a_file(client: type[FakeClient], tmp_path: Path) -> None:
    async def check(app: EdgepeftApp, screen: ChatScreen, pilot: Pilot[str]) -> None:
        await say(app, pilot, "Hello?")
        screen.query_one(LaneView).focus()
        for name in ("a.md", "a.json"):
            await pilot.press("w")
            app.screen.query_one(Input).value = str(tmp_path / name)
            await pilot.press("enter")
            await settle(app, pilot)
        assert "## You\n\nHello?\n\n## db-triage@v3\n\nYes." in (tmp_path / "a.md").read_text()
        assert len(read_stored(tmp_path / "a.json").turns) == 2
        assert "Written to" in toasts(app)

    drive(check)


def test_answers_and_code_are_copied(client: type[FakeClient], monkeypatch: pytest.MonkeyPatch) -> None:
    client.answers = ["Two:\n```python\na = 1\n```\nand\n~~~\nb\n~~~\n"]
    copied: list[str] = []

    def copy(app: object, text: str) -> str:
        copied.append(text)
        return "copied to the system clipboard"

    monkeypatch.setattr(chat_deeds, "copy_text", copy)

    async def check(app: EdgepeftApp, screen: ChatScreen, pilot: Pilot[str]) -> None:
        await say(app, pilot, "Hello?")
        screen.query_one(LaneView).focus()
        await pilot.press("c")
        await settle(app, pilot)
        await pilot.press("b")
        await pilot.pause(0.1)
        assert app.screen.query_one(OptionList).option_count == 2
        await pilot.press("down", "enter")
        await settle(app, pilot)
        assert copied == ["Two:\n```python\na = 1\n```\nand\n~~~\nb\n~~~\n", "b\n"]
        assert "The code was copied to the system clipboard" in toasts(app)

    drive(check)


def test_sampling_is_checked(client: type[FakeClient]) -> None:
    async def check(app: EdgepeftApp, screen: ChatScreen, pilot: Pilot[str]) -> None:
        await pilot.press("f10")
        dialog = app.screen
        assert isinstance(dialog, SamplingDialog)
        for value, word in (("-1", "out of range"), ("[/x]", "is not a number")):
            dialog.query_one("#temperature", Input).value = value
            await pilot.press("enter")
            await pilot.pause()
            assert word in screen_text(app)
        dialog.query_one("#temperature", Input).value = "0"
        dialog.query_one("#seed", Input).value = "7"
        await pilot.press("enter")
        await say(app, pilot, "Hello?")
        assert (client.asked[0][2].temperature, client.asked[0][2].seed) == (0.0, 7)

    drive(check)


def test_the_loop_answers_while_a_long_answer_streams(client: type[FakeClient]) -> None:
    lines = ["```python\n", *(f"value_{index} = {index} * 2  # words\n" for index in range(60)), "```\n\n"]
    lines += [f"- item **{index}** of a list with `code`\n" for index in range(60)]
    client.answers = ["".join(lines)]
    client.together, client.delay = 6, 0.005
    lags: list[float] = []

    async def watch() -> None:
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(0.01)
            lags.append(time.perf_counter() - begun - 0.01)

    async def check(app: EdgepeftApp, screen: ChatScreen, pilot: Pilot[str]) -> None:
        watcher = asyncio.create_task(watch())
        await say(app, pilot, "Hello?")
        watcher.cancel()
        assert len(screen.query(SafeMarkdown)) > 3

    drive(check)
    # A generous bound: this machine may be busy. The bench tells the figure.
    assert sorted(lags)[int(len(lags) * 0.5)] < 0.05
