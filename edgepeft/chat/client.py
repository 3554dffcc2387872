"""Clients of an inference process: `SyncInference` for the command line, `InferenceClient` for the UI.

with SyncInference.start(entry, precision="bf16", compute_dtype="bf16") as inference:
    for reply in inference.generate(prompt_ids, stop_ids):
        ...
"""

from __future__ import annotations

import asyncio
import itertools
import queue
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

from edgepeft.chat.connection import Connection, as_error, worker_arguments
from edgepeft.chat.protocol import (
    Activate,
    AdapterUse,
    Answer,
    Done,
    Generate,
    GenerateBatch,
    Loading,
    LossScored,
    Ready,
    Reply,
    Request,
    Sampling,
    ScoreLoss,
    Token,
    Trouble,
)
from edgepeft.models.store import ModelEntry
from edgepeft.spec import ComputeDtype, Precision

Progress = Callable[[str, float | None], None]


class AnswerStream:
    """The replies to one request, as an iterator that survives a Ctrl-C: after `cancel`, go on iterating to its end."""

    def __init__(self, replies: Iterator[Reply], cancel: Callable[[], None]) -> None:
        self._replies = replies
        self.cancel = cancel
        """Asks the process to stop this answer; the stream then ends soon with an `Answer`."""
        self._ended = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Token | Answer:
        if self._ended:
            raise StopIteration
        reply = next(self._replies)
        assert isinstance(reply, Token | Answer)
        self._ended = isinstance(reply, Answer)
        return reply


class _Replies:
    """The replies to one request out of the common queue; replies to requests given up before are skipped."""

    def __init__(self, source: queue.SimpleQueue[Reply | None], connection: Connection, request_id: int) -> None:
        self._source, self._connection, self._id = source, connection, request_id

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Reply:
        while True:
            reply = self._source.get()
            if reply is None:
                # Whoever asks next must learn it too.
                self._source.put(None)
                raise self._connection.death()
            if isinstance(reply, Trouble) and reply.id in (0, self._id):
                raise as_error(reply)
            if reply.id == self._id:
                return reply


class SyncInference:
    """A blocking client; one request at a time. Made by `start`."""

    def __init__(self, connection: Connection, replies: queue.SimpleQueue[Reply | None]) -> None:
        self._connection = connection
        self._replies = replies
        self._ids = itertools.count(1)
        self.ready: Ready | None = None
        """What the process told about itself when the base was loaded."""

    @classmethod
    def start(
        cls,
        entry: ModelEntry,
        precision: Precision = "bf16",
        compute_dtype: ComputeDtype = "bf16",
        device: str = "cpu",
        *,
        budget_bytes: int | None = None,
        progress: Progress | None = None,
    ) -> SyncInference:
        """Starts a process and waits until the base is loaded.

        Raises:
            EdgepeftError: the base cannot be loaded, with the exit code that tells why.
        """
        replies: queue.SimpleQueue[Reply | None] = queue.SimpleQueue()
        arguments = worker_arguments(entry.name, precision, compute_dtype, device, budget_bytes)
        client = cls(Connection(arguments, device, replies.put), replies)
        try:
            for reply in client._replies_to(0):
                if isinstance(reply, Loading) and progress is not None:
                    progress(reply.what, reply.fraction)
                if isinstance(reply, Ready):
                    client.ready = reply
                    break
        except BaseException:
            client._connection.kill()
            raise
        return client

    @property
    def alive(self) -> bool:
        """Whether the process can answer still."""
        return self._connection.alive

    def generate(
        self,
        prompt_ids: Sequence[int],
        stop_ids: Sequence[int],
        sampling: Sampling | None = None,
        adapters: Sequence[AdapterUse] = (),
    ) -> AnswerStream:
        """Answers one prompt: `Token` replies as they come, then the `Answer`."""
        request = _generate(next(self._ids), prompt_ids, stop_ids, sampling, adapters)
        self._connection.send(request)
        return AnswerStream(self._replies_to(request.id), lambda: self._connection.cancel(request.id))

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        stop_ids: Sequence[int],
        sampling: Sampling | None = None,
        adapters: Sequence[AdapterUse] = (),
        *,
        batch_size: int = 16,
    ) -> Iterator[Answer]:
        """Answers many prompts; each `Answer` comes when it is done and says by `index` which prompt it belongs to."""
        request = _generate_batch(next(self._ids), prompts, stop_ids, sampling, adapters, batch_size)
        self._connection.send(request)
        ended = False
        try:
            for reply in self._replies_to(request.id):
                if isinstance(reply, Done):
                    ended = True
                    return
                if isinstance(reply, Answer):
                    yield reply
        finally:
            if not ended:
                self._connection.cancel(request.id)

    def activate(self, adapters: Sequence[AdapterUse]) -> None:
        """Reads adapters before they are asked with; what was active stays so when that fails.

        Raises:
            EdgepeftError: one cannot be read, belongs to another base, or does not fit into the budget.
        """
        request = Activate(id=next(self._ids), adapters=list(adapters))
        self._connection.send(request)
        for reply in self._replies_to(request.id):
            if isinstance(reply, Done):
                return

    def score_loss(
        self, samples: Sequence[tuple[Sequence[int], Sequence[bool]]], adapters: Sequence[AdapterUse] = ()
    ) -> LossScored:
        """Mean loss of the trained tokens of samples, all together and each."""
        request = _score_loss(next(self._ids), samples, adapters)
        self._connection.send(request)
        try:
            for reply in self._replies_to(request.id):
                if isinstance(reply, LossScored):
                    return reply
        except KeyboardInterrupt:
            self._connection.cancel(request.id)
            raise
        raise self._connection.death()

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _replies_to(self, request_id: int) -> _Replies:
        return _Replies(self._replies, self._connection, request_id)


class InferenceClient:
    """A client for an asyncio program. Made by `start`; several requests may wait, they are answered in order."""

    def __init__(self, loop: asyncio.AbstractEventLoop, arguments: list[str], device: str) -> None:
        self._loop = loop
        self._queues: dict[int, asyncio.Queue[Reply | None]] = {0: asyncio.Queue()}
        self._ended = False
        self._ids = itertools.count(1)
        self.ready: Ready | None = None
        """What the process told about itself when the base was loaded."""
        self._connection = Connection(arguments, device, self._from_thread)

    @classmethod
    async def start(
        cls,
        entry: ModelEntry,
        precision: Precision = "bf16",
        compute_dtype: ComputeDtype = "bf16",
        device: str = "cpu",
        *,
        budget_bytes: int | None = None,
        progress: Progress | None = None,
    ) -> InferenceClient:
        """Starts a process and waits until the base is loaded.

        Raises:
            EdgepeftError: the base cannot be loaded, with the exit code that tells why.
        """
        arguments = worker_arguments(entry.name, precision, compute_dtype, device, budget_bytes)
        client = cls(asyncio.get_running_loop(), arguments, device)
        try:
            async for reply in client._replies_to(0):
                if isinstance(reply, Loading) and progress is not None:
                    progress(reply.what, reply.fraction)
                if isinstance(reply, Ready):
                    client.ready = reply
                    break
        except BaseException:
            # Not awaited in another thread: a cancelled task gets no further chance to wait.
            client._connection.kill()
            raise
        return client

    @property
    def alive(self) -> bool:
        """Whether the process can answer still."""
        return self._connection.alive

    async def generate(
        self,
        prompt_ids: Sequence[int],
        stop_ids: Sequence[int],
        sampling: Sampling | None = None,
        adapters: Sequence[AdapterUse] = (),
    ) -> AsyncIterator[Token | Answer]:
        """Answers one prompt: `Token` replies as they come, then the `Answer`; leaving the loop early stops it."""
        request = _generate(next(self._ids), prompt_ids, stop_ids, sampling, adapters)
        async for reply in self._serve(request, Answer):
            assert isinstance(reply, Token | Answer)
            yield reply

    async def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        stop_ids: Sequence[int],
        sampling: Sampling | None = None,
        adapters: Sequence[AdapterUse] = (),
        *,
        batch_size: int = 16,
    ) -> AsyncIterator[Answer]:
        """Answers many prompts; each `Answer` comes when it is done and says by `index` which prompt it belongs to."""
        request = _generate_batch(next(self._ids), prompts, stop_ids, sampling, adapters, batch_size)
        async for reply in self._serve(request, Done):
            if isinstance(reply, Answer):
                yield reply

    async def activate(self, adapters: Sequence[AdapterUse]) -> None:
        """Reads adapters before they are asked with; what was active stays so when that fails.

        Raises:
            EdgepeftError: one cannot be read, belongs to another base, or does not fit into the budget.
        """
        request = Activate(id=next(self._ids), adapters=list(adapters))
        async for _ in self._serve(request, Done):
            pass

    async def score_loss(
        self, samples: Sequence[tuple[Sequence[int], Sequence[bool]]], adapters: Sequence[AdapterUse] = ()
    ) -> LossScored:
        """Mean loss of the trained tokens of samples, all together and each."""
        request = _score_loss(next(self._ids), samples, adapters)
        async for reply in self._serve(request, LossScored):
            if isinstance(reply, LossScored):
                return reply
        raise self._connection.death()

    async def close(self) -> None:
        """Ends the process."""
        await asyncio.to_thread(self._connection.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _serve(self, request: Request, last: type[Reply]) -> AsyncIterator[Reply]:
        self._queues[request.id] = asyncio.Queue()
        ended = False
        try:
            # A long prompt may fill the pipe of a busy process; the loop must not wait for it.
            await asyncio.to_thread(self._connection.send, request)
            async for reply in self._replies_to(request.id):
                ended = isinstance(reply, last)
                yield reply
                if ended:
                    return
        finally:
            del self._queues[request.id]
            if not ended:
                self._connection.cancel(request.id)

    async def _replies_to(self, request_id: int) -> AsyncIterator[Reply]:
        waiting = self._queues[request_id]
        if self._ended:
            waiting.put_nowait(None)
        while True:
            reply = await waiting.get()
            if reply is None:
                raise await asyncio.to_thread(self._connection.death)
            if isinstance(reply, Trouble):
                raise as_error(reply)
            yield reply

    def _from_thread(self, reply: Reply | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, reply)

    def _deliver(self, reply: Reply | None) -> None:
        if reply is None:
            self._ended = True
        targets = self._queues.values() if reply is None or reply.id == 0 else [self._queues.get(reply.id)]
        for target in targets:
            if target is not None:
                target.put_nowait(reply)


def _generate(
    request_id: int,
    prompt_ids: Sequence[int],
    stop_ids: Sequence[int],
    sampling: Sampling | None,
    adapters: Sequence[AdapterUse],
) -> Generate:
    return Generate(
        id=request_id,
        prompt_ids=list(prompt_ids),
        stop_ids=list(stop_ids),
        sampling=sampling or Sampling(),
        adapters=list(adapters),
    )


def _generate_batch(
    request_id: int,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    sampling: Sampling | None,
    adapters: Sequence[AdapterUse],
    batch_size: int,
) -> GenerateBatch:
    return GenerateBatch(
        id=request_id,
        prompts=[list(prompt) for prompt in prompts],
        stop_ids=list(stop_ids),
        sampling=sampling or Sampling(temperature=0.0),
        adapters=list(adapters),
        batch_size=batch_size,
    )


def _score_loss(
    request_id: int, samples: Sequence[tuple[Sequence[int], Sequence[bool]]], adapters: Sequence[AdapterUse]
) -> ScoreLoss:
    return ScoreLoss(id=request_id, samples=[(list(ids), list(mask)) for ids, mask in samples], adapters=list(adapters))
