"""How well the base with its active adapters predicts given answers: the mean loss of each sample's trained tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from edgepeft.engine.inference.generate import memory_error
from edgepeft.engine.inference.session import Session
from edgepeft.errors import BadInput, Interrupted

_BATCH_TOKENS = 2048
"""Padded tokens that go through the model at once."""
_CHUNK_ROWS = 256
"""Rows of hidden states whose logits exist at one time."""


@torch.inference_mode()
def score_losses(
    session: Session,
    samples: Sequence[tuple[list[int], list[bool]]],
    cancelled: Callable[[], bool] = lambda: False,
) -> tuple[list[float], list[int]]:
    """Mean loss (natural logarithm) and number of trained tokens of each sample.

    A token is trained when its mask is true; the first token of a sample has nothing to be predicted from and never
    counts. A sample without trained tokens gets NaN and 0.

    Raises:
        BadInput: a sample is longer than the model's context.
        Interrupted: it was cancelled.
        OutOfMemory: not even one sample fits.
    """
    limit = session.context_length
    longest = max((len(ids) for ids, _ in samples), default=0)
    if longest > limit:
        raise BadInput(f"a sample has {longest:,} tokens, and the model takes {limit:,}", hint="Shorten it")
    losses, counts = [math.nan] * len(samples), [0] * len(samples)
    order = sorted(range(len(samples)), key=lambda index: -len(samples[index][0]))
    waiting = list(_batches(order, samples))
    while waiting:
        if cancelled():
            raise Interrupted("scoring was cancelled")
        batch = waiting.pop(0)
        try:
            _score_batch(session, samples, batch, losses, counts)
        except (RuntimeError, MemoryError) as error:
            trouble = memory_error(error, session)
            if len(batch) == 1:
                raise trouble from error
            middle = len(batch) // 2
            waiting[:0] = [batch[:middle], batch[middle:]]
    return losses, counts


def _score_batch(
    session: Session,
    samples: Sequence[tuple[list[int], list[bool]]],
    batch: list[int],
    losses: list[float],
    counts: list[int],
) -> None:
    loaded = session.loaded
    width = max(len(samples[index][0]) for index in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    trained = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, index in enumerate(batch):
        sample_ids, mask = samples[index]
        ids[row, : len(sample_ids)] = torch.tensor(sample_ids, dtype=torch.int64)
        trained[row, : len(mask)] = torch.tensor(mask, dtype=torch.bool)
    trained[:, :1] = False
    if not trained.any():
        return
    ids, trained = ids.to(loaded.device), trained.to(loaded.device)
    # Padding on the right lies after every real token, where causal attention never looks: no mask is needed.
    hidden = loaded.decoder(
        input_ids=ids, position_ids=torch.arange(width, device=loaded.device)[None], use_cache=False
    ).last_hidden_state
    for row, index in enumerate(batch):
        places = trained[row].nonzero().squeeze(1)
        counts[index] = len(places)
        if counts[index]:
            total = session.summed_loss(hidden[row : row + 1], places - 1, ids[row, places], _CHUNK_ROWS)
            losses[index] = float(total) / counts[index]


def _batches(order: list[int], samples: Sequence[tuple[list[int], list[bool]]]) -> list[list[int]]:
    """Cuts `order`, longest first, into batches of at most `_BATCH_TOKENS` padded tokens."""
    batches: list[list[int]] = []
    for index in order:
        if batches and len(samples[batches[-1][0]][0]) * (len(batches[-1]) + 1) <= _BATCH_TOKENS:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
