"""A Plan screen whose planner makes real plans of made-up parts: no model, no file and no machine is read."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from textual.pilot import Pilot
from textual.worker import WorkerCancelled

from edgepeft.errors import BadInput
from edgepeft.models.described import described_model
from edgepeft.plan.build import DATA_OPTIONS
from edgepeft.plan.options import typed_options
from edgepeft.plan.request import Given, PlanRequest
from edgepeft.units import GIB, format_bytes, parse_bytes
from edgepeft_tui import app as ui
from edgepeft_tui import choice_rows, finds, plan_text
from edgepeft_tui.app import EdgepeftApp
from edgepeft_tui.finds import DemoChoice, DrawnPiece, DrawnSample, Found
from edgepeft_tui.plans import Planner, Question
from edgepeft_tui.readings import Machine, Shelves
from edgepeft_tui.screens.plan import PlanScreen
from plans import device, entry, request
from shapes import SMOLLM2

Check = Callable[[EdgepeftApp, PlanScreen, Pilot[str]], Awaitable[None]]
HOSTILE = "[/x] [loss=1] \x1b[31mred\x07 \u202eabc 🦀 " + "n" * 10_000
LENGTHS = [60, 120, 240, 480, 1900] * 10
MODELS = {"smollm2-135m": SMOLLM2}
CARD = device(
    "cuda",
    id="GPU-1",
    name="RTX 4090",
    capability=(8, 9),
    total_bytes=24 * GIB,
    budget_bytes=22 * GIB,
    tensor_flops=165e12,
)


class MadeUp(Planner):
    """Plans for any model by name; a data file called `bad` is refused."""

    def _request_for(self, question: Question, tell: Any) -> PlanRequest:
        typed = typed_options(question.values)
        budget = typed.pop("budget", None)
        size = parse_bytes(budget, where="--budget") if budget else CARD.budget_bytes
        intent = typed.pop("intent", "balanced")
        for name in ("gpu", *DATA_OPTIONS):
            typed.pop(name, None)
        if question.data is not None and "bad" in question.data:
            raise BadInput("no record can be used", where=question.data, hint="Look at it with p")
        shape = MODELS.get(question.model)
        if shape is None:
            profile = described_model(question.model)
            if profile is None:
                raise BadInput("there is no such model", where=question.model, hint="Add it")
            shape = profile.shape
        lengths = LENGTHS if question.data is not None else None
        asked = request(size, lengths=lengths, preset=intent, base=entry(shape, name=question.model), on=CARD, **typed)
        given = {
            "gpu": Given("RTX 4090", "auto", "the freest card here"),
            "budget": Given(format_bytes(size), "user" if budget else "auto", "22.4 GiB of 24.0 GiB free now"),
            "intent": Given(intent, "user" if "intent" in question.values else "auto", "good adapters"),
        }
        return msgspec.structs.replace(asked, given=given, notes=("A note of the data.",), config={})


def patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts made-up parts where the screen would read."""
    import edgepeft_tui.screens.plan as screen

    monkeypatch.setattr(ui, "read_machine", lambda: Machine("RTX 4090 · driver 580", ()))
    monkeypatch.setattr(ui, "read_shelves", lambda: Shelves((), (), ()))
    monkeypatch.setattr(screen, "Planner", MadeUp)
    monkeypatch.setattr(finds, "store_models", lambda: (Found("smollm2-135m", "134.5 M  bf16 0.25 GiB"),))
    monkeypatch.setattr(finds, "scanned_models", lambda: (Found("/disk/other", "other/model  2 GiB"),))
    monkeypatch.setattr(finds, "described_models", lambda: (Found("llama-3.1-70b", "70 B  plan only"),))
    monkeypatch.setattr(finds, "recent_data", lambda: (Found("/data/used.jsonl", "used by db-1"),))
    monkeypatch.setattr(choice_rows, "_devices", lambda: (("GPU-1", "RTX 4090"), ("cpu", "the processor")))
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    monkeypatch.setattr(plan_text, "now", lambda: 1_764_000_000.0)
    demo = DemoChoice("smollm2-135m", "/demo/train.jsonl", {"precision": "nf4", "rank": "16"}, "demo-database")
    monkeypatch.setattr(finds, "demo_choice", lambda: demo)
    pieces = (DrawnPiece("<|im_start|>user\n[/x] What?", False, False), DrawnPiece("An answer<|im_end|>", True, False))
    samples = (DrawnSample("record 1, line 1", pieces, 20, 6), DrawnSample("record 2, line 2", trouble=HOSTILE))
    monkeypatch.setattr(finds, "drawn_samples", lambda model, data, values: samples)


async def settle(app: EdgepeftApp, pilot: Pilot[str]) -> None:
    """Waits until nothing is worked on."""
    for _ in range(200):
        await pilot.pause()
        # A glance that a newer one replaces is cancelled.
        with contextlib.suppress(WorkerCancelled):
            await app.workers.wait_for_complete()
        await pilot.pause()
        screen = app.screen_stack[0]
        if not (isinstance(screen, PlanScreen) and screen.desk.busy):
            break


def drive(check: Check, size: tuple[int, int] = (100, 30), **what: Any) -> EdgepeftApp:
    """Opens the screen as another would, and lets a test drive it."""

    async def run() -> EdgepeftApp:
        app = EdgepeftApp()
        async with app.run_test(size=size, notifications=True) as pilot:
            await app.go("plan", **what)
            await settle(app, pilot)
            screen = app.screen
            assert isinstance(screen, PlanScreen)
            await check(app, screen, pilot)
        return app

    return asyncio.run(run())


def screen_text(app: EdgepeftApp) -> str:
    """What is on the screen."""
    return "\n".join("".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips())


def told(app: EdgepeftApp) -> str:
    """All toasts."""
    return " ".join(toast.message for toast in app._notifications)
