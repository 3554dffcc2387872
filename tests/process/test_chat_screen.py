"""The Chat screen over the real inference process, on a tiny model."""

from __future__ import annotations

import asyncio
from pathlib import Path

from adapter_files import make_card, write_peft_folder
from chat_fakes import settle
from edgepeft.chat.client import InferenceClient
from edgepeft.chat.protocol import Sampling
from edgepeft.library.store import publish
from edgepeft.models.store import add_model
from edgepeft_tui.app import EdgepeftApp
from edgepeft_tui.screens.chat import ChatScreen
from edgepeft_tui.widgets.composer import Composer
from tiny import write_tiny_model


def test_chat_swap_stop_and_death(tmp_path: Path) -> None:
    entry = add_model(write_tiny_model(tmp_path / "src", max_position_embeddings=200_000), "tiny", copy=True)
    card = make_card(base_fingerprint=entry.fingerprint, precision="fp32", template=None)
    publish(write_peft_folder(tmp_path / "a", entry.shape), "made", card)

    async def run() -> None:
        app = EdgepeftApp()
        async with app.run_test(size=(100, 30), notifications=True) as pilot:
            await app.go("chat")
            await settle(app, pilot)
            screen = app.screen
            assert isinstance(screen, ChatScreen)
            talk = screen.talk
            assert talk.lane.label == "made v1 ×1.0"
            assert talk._session._client is None
            # Random bytes: what comes must be drawn, whatever it is.
            talk.sampling = Sampling(temperature=0.0, max_new_tokens=60)
            composer = screen.query_one(Composer)

            async def ask(text: str) -> str:
                composer.text = text
                await pilot.press("enter")
                for _ in range(600):
                    await settle(app, pilot)
                    if not talk.busy:
                        break
                return talk.lane.last_answer or ""

            with_adapter = await ask("Hello?")
            assert with_adapter
            client = talk._session._client
            assert isinstance(client, InferenceClient)
            await pilot.press("ctrl+l")
            await settle(app, pilot)
            screen.talk.begin_anew()
            await pilot.pause()
            assert await ask("Hello?") != with_adapter
            assert talk._session._client is client
            talk.sampling = Sampling(temperature=0.0, max_new_tokens=100_000)
            composer.text = "Go on"
            await pilot.press("enter")
            for _ in range(500):
                await asyncio.sleep(0.02)
                if talk.lane.answer_tokens > 5:
                    break
            await pilot.press("escape")
            await settle(app, pilot)
            stopped = talk.lane.last_answer
            assert stopped
            assert not talk.busy
            # The same process answers on, and one that died is told and started anew.
            talk.sampling = Sampling(temperature=0.0, max_new_tokens=20)
            await ask("More")
            assert talk._session._client is client
            client._connection._process.kill()
            client._connection._process.wait()
            await ask("Still there?")
            again = talk._session._client
            assert again is not client
            assert isinstance(again, InferenceClient)
            assert talk.lane.last_question == "Still there?"
        assert not again.alive

    asyncio.run(run())
