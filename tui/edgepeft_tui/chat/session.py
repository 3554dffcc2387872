"""The inference process behind the chat: started when it is needed, changed with the base, ended with the UI."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from edgepeft.chat.client import InferenceClient
from edgepeft.chat.setup import Setup

Progress = Callable[[str, float | None], None]


class Session:
    """At most one process; `ready` starts it, or another one when the base or how it is held has changed."""

    def __init__(self) -> None:
        self._client: InferenceClient | None = None
        self._key: tuple[str, ...] = ()
        self._lock = asyncio.Lock()

    @property
    def alive(self) -> bool:
        """Whether a process is there that can answer."""
        return self._client is not None and self._client.alive

    async def ready(self, setup: Setup, progress: Progress) -> tuple[InferenceClient, tuple[str, ...]]:
        """The client, and what a process that was just started warns of.

        Raises:
            EdgepeftError: the base cannot be loaded.
        """
        key = (setup.entry.name, setup.entry.fingerprint, setup.precision, setup.compute_dtype, setup.device)
        # A second caller waits for the process that the first one starts.
        async with self._lock:
            if self._client is not None and self._key == key and self._client.alive:
                return self._client, ()
            await self._end()
            progress("starting", None)
            client = await InferenceClient.start(
                setup.entry, setup.precision, setup.compute_dtype, setup.device, progress=progress
            )
            self._client, self._key = client, key
            return client, client.ready.warnings if client.ready is not None else ()

    async def close(self) -> None:
        """Ends the process, if there is one."""
        async with self._lock:
            await self._end()

    async def _end(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            # A process that is gone has ended.
            with contextlib.suppress(OSError):
                await client.close()
