"""The worker's ends of chat/protocol.py, and how each request is served."""

from __future__ import annotations

import math
import queue
import threading
from typing import BinaryIO

import msgspec

from edgepeft.chat.protocol import (
    Activate,
    Answer,
    Cancel,
    Done,
    Generate,
    GenerateBatch,
    LossScored,
    Quit,
    Reply,
    Request,
    ScoreLoss,
    Token,
    Trouble,
)
from edgepeft.engine.inference.generate import Generated, generate, generate_batch
from edgepeft.engine.inference.score import score_losses
from edgepeft.engine.inference.session import Session
from edgepeft.errors import EdgepeftError, ExitCode


class Wire:
    """The two ends of the protocol; a thread reads, so that a cancel is seen while an answer is made."""

    def __init__(self, requests: BinaryIO, replies: BinaryIO) -> None:
        self._requests, self._replies = requests, replies
        self.waiting: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._cancelled: set[int] = set()
        self._writing = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._read, daemon=True, name="requests").start()

    def send(self, reply: Reply) -> None:
        """Writes one reply; a reader that went away ends the process."""
        with self._writing:
            try:
                self._replies.write(msgspec.json.encode(reply) + b"\n")
                self._replies.flush()
            except OSError:
                self._closed.set()

    def cancelled(self, request_id: int) -> bool:
        """Whether the request is not wanted any more."""
        return self._closed.is_set() or request_id in self._cancelled

    def _read(self) -> None:
        decoder = msgspec.json.Decoder(Request)
        for line in self._requests:
            try:
                request = decoder.decode(line)
            except msgspec.DecodeError as error:
                self.send(Trouble(id=-1, message=f"not a request: {error}", exit_code=ExitCode.BUG))
                continue
            if isinstance(request, Cancel):
                self._cancelled.add(request.id)
                continue
            self.waiting.put(request)
            if isinstance(request, Quit):
                break
        self._closed.set()
        self.waiting.put(None)


def serve(wire: Wire, session: Session) -> None:
    """Answers one request after the other until `Quit` or the end of the requests."""
    while (request := wire.waiting.get()) is not None and not isinstance(request, Quit):
        try:
            _answer(wire, session, request)
        except EdgepeftError as error:
            wire.send(Trouble(id=request.id, message=str(error), exit_code=error.exit_code))


def _answer(wire: Wire, session: Session, request: Request) -> None:
    def cancelled() -> bool:
        return wire.cancelled(request.id)

    def send_answer(index: int, made: Generated) -> None:
        wire.send(
            Answer(
                id=request.id,
                index=index,
                ids=made.ids,
                stopped_by=made.stopped_by,
                prompt_tokens=made.prompt_tokens,
                prefill_seconds=made.prefill_seconds,
                tokens_per_second=made.tokens_per_second,
            )
        )

    if isinstance(request, Generate):
        session.activate(request.adapters)
        send_answer(
            0,
            generate(
                session,
                request.prompt_ids,
                request.stop_ids,
                request.sampling,
                lambda token: wire.send(Token(id=request.id, ids=[token])),
                cancelled,
            ),
        )
    elif isinstance(request, GenerateBatch):
        session.activate(request.adapters)
        generate_batch(
            session,
            request.prompts,
            request.stop_ids,
            request.sampling,
            request.batch_size,
            send_answer,
            cancelled,
        )
        wire.send(Done(id=request.id))
    elif isinstance(request, Activate):
        session.activate(request.adapters)
        wire.send(Done(id=request.id))
    elif isinstance(request, ScoreLoss):
        session.activate(request.adapters)
        losses, counts = score_losses(session, request.samples, cancelled)
        total = sum(counts)
        scored = sum(loss * count for loss, count in zip(losses, counts, strict=True) if count)
        wire.send(
            LossScored(
                id=request.id,
                mean_loss=scored / total if total else 0.0,
                trained_tokens=total,
                # JSON has no NaN; the reader knows its own masks.
                losses=[loss if math.isfinite(loss) else 0.0 for loss in losses],
            )
        )
