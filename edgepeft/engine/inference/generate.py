"""Token by token: one streamed answer, or many answers in a batch.

Both end at a stop token, at `max_new_tokens`, at the context limit or when cancelled, and both take the same path
through the model as training does, without a graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from edgepeft.chat.protocol import Sampling
from edgepeft.engine.inference.sampling import Sampler
from edgepeft.engine.inference.session import KeptPrefix, Session
from edgepeft.engine.training.recovery import is_out_of_memory
from edgepeft.errors import BadInput, DoesNotFit, OutOfMemory
from edgepeft.memory.chunks import BATCH_PREFILL, PREFILL_TOKENS

_COMPACT_SHARE = 0.75
"""Finished rows are cut out of the cache when at most this share of its rows still speaks; cutting copies the rest."""

Cancelled = Callable[[], bool]


@dataclass
class Generated:
    """One answer."""

    prompt_tokens: int
    ids: list[int] = field(default_factory=list)
    """Without the stop token."""
    stopped_by: str = "cancelled"
    """`stop`, `length`, `context` or `cancelled`."""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    reused_tokens: int = 0
    """Prompt tokens whose keys and values were kept from the turn before."""

    @property
    def tokens_per_second(self) -> float:
        """Speed after the prompt was read; 0 for an empty answer."""
        return len(self.ids) / self.decode_seconds if self.decode_seconds > 0 else 0.0


@torch.inference_mode()
def generate(
    session: Session,
    prompt_ids: list[int],
    stop_ids: Sequence[int],
    sampling: Sampling,
    on_token: Callable[[int], None] = lambda _: None,
    cancelled: Cancelled = lambda: False,
) -> Generated:
    """Answers one prompt with the session's active adapters; each token is told as soon as it is known.

    Raises:
        BadInput: the prompt is empty or fills the model's context.
        UsageError: a sampling value is out of range.
        OutOfMemory: keys and values of the conversation do not fit.
    """
    limit = session.token_limit()
    _check_prompt(session, prompt_ids, limit)
    sampler = Sampler(sampling, prompt_ids)
    stops = set(stop_ids)
    answer = Generated(len(prompt_ids))
    prefix = session.take_prefix(prompt_ids)
    answer.reused_tokens = len(prefix.ids)
    try:
        begun = time.perf_counter()
        logits = _read_prompt(session, prefix, prompt_ids, cancelled)
        answer.prefill_seconds = time.perf_counter() - begun
        begun = time.perf_counter()
        while logits is not None and not cancelled():
            token = sampler.draw(logits)
            if token in stops:
                answer.stopped_by = "stop"
                break
            answer.ids.append(token)
            on_token(token)
            if len(answer.ids) >= sampling.max_new_tokens:
                answer.stopped_by = "length"
                break
            if len(prefix.ids) + 1 >= limit:
                answer.stopped_by = "context"
                break
            logits = _forward(session, torch.tensor([[token]]), prefix.cache)[0]
            prefix.ids.append(token)
        answer.decode_seconds = time.perf_counter() - begun
    except (RuntimeError, MemoryError) as error:
        raise memory_error(error, session) from error
    session.keep_prefix(prefix)
    return answer


@torch.inference_mode()
def generate_batch(
    session: Session,
    prompts: Sequence[list[int]],
    stop_ids: Sequence[int],
    sampling: Sampling,
    batch_size: int = 16,
    on_answer: Callable[[int, Generated], None] = lambda _, __: None,
    cancelled: Cancelled = lambda: False,
) -> list[Generated]:
    """Answers many prompts, those of like length together; a batch that does not fit in memory is halved.

    Args:
        on_answer: told (position in `prompts`, answer) as each one ends.

    Returns:
        The answers in the order of the prompts.

    Raises:
        BadInput: a prompt is empty or fills the model's context.
        UsageError: a sampling value is out of range.
        OutOfMemory: a single prompt does not fit in memory.
    """
    for prompt in prompts:
        _check_prompt(session, prompt, session.token_limit())
    session.prefix = None
    answers = [Generated(len(prompt)) for prompt in prompts]
    # The longest first: what does not fit is known at once.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    waiting = _batches(order, prompts, batch_size, alike=session.wants_rows_alike)
    done: set[int] = set()

    def finish(index: int, stopped_by: str) -> None:
        answers[index].stopped_by = stopped_by
        done.add(index)
        on_answer(index, answers[index])

    while waiting:
        batch = waiting.pop(0)
        longest = max(len(prompts[index]) for index in batch)
        if len(batch) > 1 and session.token_limit(len(batch)) < longest + sampling.max_new_tokens:
            waiting[:0] = _halves(batch)
            continue
        try:
            _answer_batch(session, prompts, batch, answers, set(stop_ids), sampling, finish, cancelled)
        except (RuntimeError, MemoryError) as error:
            trouble = memory_error(error, session)
            rest = [index for index in batch if index not in done]
            if len(rest) <= 1:
                raise trouble from error
            for index in rest:
                answers[index] = Generated(len(prompts[index]))
            waiting[:0] = _halves(rest)
    return answers


def memory_error(error: RuntimeError | MemoryError, session: Session) -> OutOfMemory:
    """The error as a person needs it when memory ran out; any other is raised again as it is."""
    if not is_out_of_memory(error):
        raise error
    session.prefix = None
    if session.loaded.device.type == "cuda":
        torch.cuda.empty_cache()
    return OutOfMemory(
        "memory ran out while answering",
        where=str(session.loaded.device),
        hint="Shorten the conversation, lower --max-new-tokens, or use --precision nf4",
    )


def _read_prompt(session: Session, prefix: KeptPrefix, prompt_ids: list[int], cancelled: Cancelled) -> Tensor | None:
    """Puts the prompt's missing tokens into the cache; logits of its last one, [V], or None when cancelled."""
    logits: Tensor | None = None
    while len(prefix.ids) < len(prompt_ids):
        if cancelled():
            return None
        chunk = prompt_ids[len(prefix.ids) : len(prefix.ids) + PREFILL_TOKENS]
        logits = _forward(session, torch.tensor([chunk]), prefix.cache)[0]
        prefix.ids += chunk
    return logits


def _answer_batch(
    session: Session,
    prompts: Sequence[list[int]],
    batch: list[int],
    answers: list[Generated],
    stops: set[int],
    sampling: Sampling,
    finish: Callable[[int, str], None],
    cancelled: Cancelled,
) -> None:
    """Answers the prompts at `batch`, padded on the left so that every row's next token is the last column's."""
    device, limit = session.loaded.device, session.token_limit(len(batch))
    width = max(len(prompts[index]) for index in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    mask = torch.zeros(len(batch), width, dtype=torch.int64)
    for row, index in enumerate(batch):
        ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
        mask[row, width - len(prompts[index]) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(1) - 1).clamp_(min=0)
    cache = DynamicCache()
    begun = time.perf_counter()
    step = max(1, PREFILL_TOKENS * BATCH_PREFILL // len(batch))
    logits = torch.empty(0)
    for start in range(0, width, step):
        if cancelled():
            break
        end = min(width, start + step)
        logits = _forward(session, ids[:, start:end], cache, mask[:, :end], positions[:, start:end])
    prefill_seconds = time.perf_counter() - begun
    begun = time.perf_counter()
    samplers = [Sampler(sampling, prompts[index], row=index) for index in batch]
    greedy = sampling.temperature == 0 and sampling.repetition_penalty == 1.0
    position = positions[:, -1:]
    rows: list[int | None] = list(range(len(batch)))
    """Row of the cache → position in `batch`; None for a row that has ended."""

    def end_row(row: int, stopped_by: str) -> None:
        at = rows[row]
        assert at is not None
        rows[row] = None
        answer = answers[batch[at]]
        answer.prefill_seconds = prefill_seconds
        answer.decode_seconds = time.perf_counter() - begun
        finish(batch[at], stopped_by)

    while any(at is not None for at in rows):
        if cancelled():
            for row, at in enumerate(rows):
                if at is not None:
                    end_row(row, "cancelled")
            return
        likeliest = logits.argmax(-1).tolist() if greedy else []
        tokens = [0] * len(rows)
        for row, at in enumerate(rows):
            if at is None:
                continue
            token = likeliest[row] if greedy else samplers[at].draw(logits[row])
            answer = answers[batch[at]]
            if token in stops:
                end_row(row, "stop")
                continue
            tokens[row] = token
            answer.ids.append(token)
            if len(answer.ids) >= sampling.max_new_tokens:
                end_row(row, "length")
            elif answer.prompt_tokens + len(answer.ids) >= limit:
                end_row(row, "context")
        alive = [row for row, at in enumerate(rows) if at is not None]
        if not alive:
            return
        if len(alive) <= _COMPACT_SHARE * len(rows):
            chosen = torch.tensor(alive, device=device)
            cache.batch_select_indices(chosen)
            mask, position = mask[chosen], position[chosen]
            rows, tokens = [rows[row] for row in alive], [tokens[row] for row in alive]
        position = position + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        logits = _forward(session, torch.tensor(tokens)[:, None], cache, mask, position)


def _forward(
    session: Session,
    ids: Tensor,
    cache: DynamicCache,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Runs tokens [B, T] behind the cache; logits after the last one, [B, V]."""
    hidden = session.loaded.decoder(
        input_ids=ids.to(session.loaded.device),
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return session.logits(hidden[:, -1].contiguous())


def _check_prompt(session: Session, prompt_ids: Sequence[int], limit: int) -> None:
    context = session.context_length
    if not prompt_ids:
        raise BadInput("the prompt is empty", where="prompt", hint="Write something")
    if len(prompt_ids) >= context:
        raise BadInput(
            f"the conversation has {len(prompt_ids):,} tokens, and the model takes {context:,}",
            where="prompt",
            hint="Use /reset, or shorten it",
        )
    if len(prompt_ids) >= limit:
        raise DoesNotFit(
            f"the conversation has {len(prompt_ids):,} tokens, and the memory budget holds {limit:,}",
            hint="Use /reset, a larger budget or --precision nf4",
        )
    if not all(0 <= token < session.loaded.shape.vocab for token in prompt_ids):
        raise BadInput(
            "the prompt has tokens that the model does not know",
            where="prompt",
            hint="Its tokenizer does not belong to its weights",
        )


def _batches(order: list[int], prompts: Sequence[list[int]], batch_size: int, *, alike: bool) -> list[list[int]]:
    """Cuts `order`, longest first, into batches; with `alike` only of prompts of one length."""
    batches: list[list[int]] = []
    for index in order:
        last = batches[-1] if batches else []
        if not last or len(last) == batch_size or (alike and len(prompts[last[0]]) != len(prompts[index])):
            batches.append([index])
        else:
            last.append(index)
    return batches


def _halves(indices: list[int]) -> list[list[int]]:
    middle = (len(indices) + 1) // 2
    return [indices[:middle], indices[middle:]]
