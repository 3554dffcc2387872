"""How the Chat screen looks at three sizes, with recorded answers."""

from __future__ import annotations

from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input

from chat_fakes import install, settle
from edgepeft_tui.app import EdgepeftApp
from edgepeft_tui.screens.chat import ChatScreen
from edgepeft_tui.widgets.composer import Composer

SIZES = ((120, 40), (80, 24), (60, 20))
QUESTION = "remaining connection slots are reserved (orders)"
ANSWER = """The message means that the **database** has run out of connections:

- `max_connections` is reached
- the last slots are kept for *administrators*
  1. look at who holds them
  2. raise the limit

| system | severity |
|---|---|
| database | critical |

```json
{"system": "database", "severity": "critical"}
```
"""
TRIAGE = '{"system": "database", "severity": "critical", "cause": "connection_exhaustion"}'


async def _open(pilot: Pilot[Any]) -> tuple[EdgepeftApp, ChatScreen]:
    app = pilot.app
    assert isinstance(app, EdgepeftApp)
    await pilot.press("f5")
    await settle(app, pilot)
    screen = app.screen
    assert isinstance(screen, ChatScreen)
    screen.query_one(Composer).cursor_blink = False
    return app, screen


async def _say(app: EdgepeftApp, screen: ChatScreen, pilot: Pilot[Any]) -> None:
    screen.query_one(Composer).text = QUESTION
    await pilot.press("enter")
    await settle(app, pilot)
    for lane in screen.talk.lanes:
        lane.tokens_per_second = 71.0
    screen.query_one(Composer).text = "and now?"
    await pilot.pause()


@pytest.mark.parametrize("size", SIZES)
def test_an_answer(snap_compare: Any, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    install(monkeypatch).answers = [ANSWER]

    async def run(pilot: Pilot[Any]) -> None:
        app, screen = await _open(pilot)
        await _say(app, screen, pilot)

    assert snap_compare(EdgepeftApp(), terminal_size=size, run_before=run)


@pytest.mark.parametrize("size", SIZES)
def test_lanes_side_by_side(snap_compare: Any, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    install(monkeypatch).answers = [ANSWER.partition("\n\n|")[0], TRIAGE]

    async def run(pilot: Pilot[Any]) -> None:
        app, screen = await _open(pilot)
        screen.show(adapters=["db-triage"])
        await settle(app, pilot)
        await _say(app, screen, pilot)

    assert snap_compare(EdgepeftApp(), terminal_size=size, run_before=run)


@pytest.mark.parametrize("size", SIZES)
def test_the_choice_of_adapters(snap_compare: Any, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    install(monkeypatch)

    async def run(pilot: Pilot[Any]) -> None:
        app, _ = await _open(pilot)
        await pilot.press("ctrl+f")
        app.screen.query_one(Input).cursor_blink = False
        await pilot.press("space", "left", "down", "space")
        await pilot.pause()

    assert snap_compare(EdgepeftApp(), terminal_size=size, run_before=run)
