"""A chat without a process: prepared bases and a client that streams recorded answers."""

from __future__ import annotations

import asyncio
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from textual.pilot import Pilot

from edgepeft.chat.protocol import AdapterUse, Answer, Loading, Ready, Sampling, Token
from edgepeft.chat.setup import ChosenAdapter, Prompting, Setup
from edgepeft.errors import BadInput, EdgepeftError
from edgepeft.library.store import AdapterFolder
from edgepeft_tui import app as ui
from edgepeft_tui.app import EdgepeftApp
from edgepeft_tui.chat import session, talk
from edgepeft_tui.chat.choices import Prepared, Start
from edgepeft_tui.readings import Machine, Shelves
from edgepeft_tui.screens import chat as chat_screen
from edgepeft_tui.screens.chat import ChatScreen

Check = Callable[[EdgepeftApp, ChatScreen, Pilot[str]], Awaitable[None]]
CONTEXT = 8192


class Characters:
    """A tokenizer whose tokens are characters."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(map(chr, ids))


class FakeClient:
    """What `InferenceClient` is to the chat. `answers` are taken in turn; `gate` holds an answer after each token."""

    started: list[str]
    closed = 0
    answers: list[str]
    asked: list[tuple[str, tuple[AdapterUse, ...], Sampling]]
    gate: asyncio.Event | None = None
    cancelled = 0
    fail_start: EdgepeftError | None = None
    fail_answer: EdgepeftError | None = None
    delay = 0.0
    together = 1
    """Tokens of one reply."""

    def __init__(self) -> None:
        self.alive = True
        self.ready = Ready(id=0, device="cpu", precision="bf16", live_bytes=1, load_seconds=0.0)

    @classmethod
    async def start(cls, entry: Any, precision: str, *_: object, progress: Callable[..., None]) -> FakeClient:
        cls.started.append(f"{entry.name} {precision}")
        progress(Loading(id=0, what="weights").what, 0.5)
        await asyncio.sleep(0)
        if cls.fail_start is not None:
            raise cls.fail_start
        return cls()

    async def generate(
        self, ids: Sequence[int], stops: Sequence[int], sampling: Sampling, uses: Sequence[AdapterUse]
    ) -> AsyncIterator[Token | Answer]:
        cls = type(self)
        cls.asked.append(("".join(map(chr, ids)), tuple(uses), sampling))
        text = cls.answers.pop(0) if cls.answers else "Yes."
        try:
            for start in range(0, len(text), cls.together):
                if cls.gate is not None:
                    await cls.gate.wait()
                await asyncio.sleep(cls.delay)
                if cls.fail_answer is not None and start >= len(text) // 2:
                    raise cls.fail_answer
                yield Token(id=1, ids=[ord(char) for char in text[start : start + cls.together]])
        except (asyncio.CancelledError, GeneratorExit):
            cls.cancelled += 1
            raise
        yield Answer(
            id=1,
            ids=[ord(char) for char in text],
            stopped_by="stop",
            prompt_tokens=len(ids),
            prefill_seconds=0.1,
            tokens_per_second=71.0,
        )

    async def close(self) -> None:
        type(self).closed += 1


def adapter(name: str, version: int = 1) -> AdapterFolder:
    return AdapterFolder(Path(f"/library/{name}/v{version}"), name, version, None, {"peft_type": "LORA", "r": 16})


ADAPTERS = (adapter("db-triage", 3), adapter("net-triage"), adapter("polite", 2))


def prompting() -> Prompting:
    return Prompting(cast(Any, Characters()), cast(Any, None), (0,), None, ())


def setup(model: str) -> Setup:
    shape = types.SimpleNamespace(context_length=CONTEXT)
    entry = types.SimpleNamespace(name=model, fingerprint=f"sha256:{model}", shape=shape, folder="/nowhere")
    return Setup(cast(Any, entry), (), "nf4", "bf16", "cpu", "a CPU", ())


def fake_prepare(model: str | None, lanes: Any, precision: str | None = None, progress: Any = None) -> Prepared:
    if model == "missing":
        raise BadInput("no model is called 'missing'", where="model", hint="See: edgepeft models list")
    by_name = {one.name: one for one in ADAPTERS} | {one.reference: one for one in ADAPTERS}
    chosen = []
    for lane in lanes:
        known = []
        for one in lane:
            if isinstance(one, ChosenAdapter):
                known.append(one)
                continue
            name, _, scale = one.partition("=")
            if name not in by_name:
                raise BadInput(f"no adapter is called {name!r}", where="adapter")
            known.append(ChosenAdapter(by_name[name], float(scale or 1)))
        chosen.append(tuple(known))
    return Prepared(
        setup=setup(model or "Llama-3.1-8B"),
        lanes=tuple(chosen),
        promptings=tuple(prompting() for _ in chosen),
        advised=Sampling(),
        fitting=ADAPTERS,
    )


def fake_encode(messages: Sequence[dict[str, str]], _: Prompting) -> list[int]:
    return [ord(char) for char in "\n".join(f"{one['role']}: {one['content']}" for one in messages)]


def install(monkeypatch: pytest.MonkeyPatch, start: Start | None = None) -> type[FakeClient]:
    """Puts the fakes in place; returns the client's class, which records what was asked."""

    class Client(FakeClient):
        started: list[str] = []  # noqa: RUF012
        answers: list[str] = []  # noqa: RUF012
        asked: list[tuple[str, tuple[AdapterUse, ...], Sampling]] = []  # noqa: RUF012

    monkeypatch.setattr(ui, "read_machine", lambda: Machine("a machine", ()))
    monkeypatch.setattr(ui, "read_shelves", lambda: Shelves((), (), ()))
    monkeypatch.setattr(session, "InferenceClient", Client)
    monkeypatch.setattr(talk, "prepare", fake_prepare)
    monkeypatch.setattr(talk, "adopt", lambda setup, chosen: (prompting(), ()))
    monkeypatch.setattr(talk, "read_fitting", lambda entry: ADAPTERS)
    monkeypatch.setattr(talk, "encode_conversation", fake_encode)
    found = start or Start("Llama-3.1-8B", ("db-triage",), True)
    monkeypatch.setattr(chat_screen, "read_start", lambda: found)
    return Client


async def settle(app: EdgepeftApp, pilot: Pilot[str]) -> None:
    """Until nothing is answered or chosen any more, and it is drawn."""
    screen = app.screen_stack[0]
    for _ in range(600):
        await pilot.pause()
        busy = [
            worker
            for worker in app.workers
            if worker.group in ("choose", "answer", "write", "copy") and not worker.is_finished
        ]
        if not busy and not (isinstance(screen, ChatScreen) and screen.talk.busy):
            break
        await asyncio.sleep(0.01)
    await pilot.pause()
    await pilot.pause()


def drive(check: Check, size: tuple[int, int] = (100, 30)) -> None:
    """Opens the chat and runs `check`."""

    async def run() -> None:
        app = EdgepeftApp()
        async with app.run_test(size=size, notifications=True) as pilot:
            await pilot.press("f5")
            await settle(app, pilot)
            screen = app.screen
            assert isinstance(screen, ChatScreen)
            await check(app, screen, pilot)

    asyncio.run(run())


def screen_text(app: EdgepeftApp) -> str:
    """What is drawn."""
    return "\n".join("".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips())


def toasts(app: EdgepeftApp) -> str:
    """What was told."""
    return " ".join(toast.message for toast in app._notifications)
