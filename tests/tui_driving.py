"""Drives the terminal UI in tests, and reads what is on its screen."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from textual.pilot import Pilot

from edgepeft_tui.app import EdgepeftApp

HOSTILE = "[/x] [loss=1] \x1b[31mred\x07 \u202eabc 🦀 " + "n" * 10_000
"""A text as somebody means harm with it: markup, escapes, a change of direction, an emoji, and no end."""
Check = Callable[[EdgepeftApp, Pilot[str]], Awaitable[None]]


def drive(check: Check, *keys: str, size: tuple[int, int] = (100, 30)) -> EdgepeftApp:
    """Opens the app, presses `keys`, waits until nothing works any more, and checks."""
    app = EdgepeftApp()

    async def run() -> None:
        async with app.run_test(size=size, notifications=True) as pilot:
            await settle(app, pilot)
            await pilot.press(*keys)
            await settle(app, pilot)
            await check(app, pilot)

    asyncio.run(run())
    return app


async def settle(app: EdgepeftApp, pilot: Pilot[str]) -> None:
    """Waits for workers, and for what is read when the cursor rests."""
    for _ in range(2):
        await pilot.pause(0.08)
        for _ in range(500):
            working = [worker for worker in app.workers if worker.is_running]
            if not working:
                break
            await pilot.pause(0.02)
        else:
            raise AssertionError(f"still working: {working}")


def seen(app: EdgepeftApp) -> str:
    """The text on the screen."""
    return "\n".join("".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips())


def told(app: EdgepeftApp) -> str:
    """What was said in toasts."""
    return " | ".join(toast.message for toast in app._notifications)
