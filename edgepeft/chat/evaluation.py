"""How good a base or an adapter is on a file of records: held-out loss, and answers compared with their references."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from edgepeft.chat.client import SyncInference
from edgepeft.chat.protocol import AdapterUse, Answer, Sampling
from edgepeft.chat.scoring import Row, Scores, score_answers
from edgepeft.data.conversation import RecordError
from edgepeft.data.encode import encode_prompt, encode_record
from edgepeft.data.records import BadRecord, Format, Record, read_records
from edgepeft.data.template import ChatTemplate
from edgepeft.data.tokens import Tokenizer
from edgepeft.errors import BadInput
from edgepeft.library.peft_config import leading_tokens
from edgepeft.library.store import open_adapter
from edgepeft.models.store import ModelEntry
from edgepeft.spec import TrainOn

_LOSS_SAMPLES = 64
"""Samples of one loss request: small enough that progress moves, large enough to be batched well."""


class EvaluatedRecord(msgspec.Struct, frozen=True):
    """One record of the file and what came of it."""

    line: int
    """Line (in parquet: row) of the file."""
    loss: float | None
    """Mean over the record's trained tokens; None when it has none."""
    reference: str | None
    """The answer in the file; None when the record asks for no answer in text."""
    answer: str | None
    """The answer given; None when none was asked for."""
    stopped_by: str | None
    """`stop`, `length` or `context`."""
    score: Row | None


class Evaluation(msgspec.Struct, frozen=True):
    """What `edgepeft eval` tells."""

    records: int
    """Usable records that were evaluated."""
    loss: float | None
    """Mean over all trained tokens, natural logarithm; None when there are none."""
    trained_tokens: int
    scores: Scores | None
    """None when no record has an answer in text."""
    rows: tuple[EvaluatedRecord, ...]
    notes: tuple[str, ...]
    """What was left out, and why."""
    seconds: float
    """Time for losses and answers, without loading."""
    answer_tokens: int
    answer_tokens_per_second: float


class EvaluationProgress(msgspec.Struct, frozen=True):
    """Where an evaluation is."""

    what: str
    """`losses` or `answers`."""
    done: int
    total: int
    eta_seconds: float | None
    """Time left for this part, by its speed so far; None at its beginning."""


_ETA_SHARE = 0.2
"""Done share from which the time left is told."""

Progress = Callable[[EvaluationProgress], None]
_Sample = tuple[int, list[int], list[bool]]
"""Index of the record, token ids, and which of them are trained."""


def evaluate(
    client: SyncInference,
    entry: ModelEntry,
    data: Path,
    adapters: Sequence[AdapterUse] = (),
    *,
    max_new_tokens: int = 256,
    limit: int | None = None,
    template: ChatTemplate | None = None,
    stop_ids: Sequence[int] | None = None,
    system: str | None = None,
    format: Format | None = None,
    columns: dict[str, str] | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Evaluation:
    """Scores the base with `adapters` on every usable record of `data`, answering greedily.

    Args:
        client: an inference process with the base loaded.
        entry: the base.
        data: any file that `edgepeft data check` reads.
        adapters: active for losses and answers.
        max_new_tokens: longest answer.
        limit: use only the first records.
        template: the chat template; None for the base's own.
        stop_ids: tokens that end an answer; None for those of the template.
        system: put before records that have no system message, as in training.
        format: of the file; detected when None.
        columns: the format's field → the file's column.
        batch_size: prompts answered at once.
        progress: told as records are done.

    Raises:
        BadInput: the file cannot be read, or has no usable record.
    """
    tokenizer = Tokenizer.load(Path(entry.folder))
    template = template or ChatTemplate.load(Path(entry.folder))
    notes: list[str] = []
    records = _usable_records(data, format, columns, limit, notes)
    begun = time.perf_counter()
    folders = {use.folder for use in adapters if use.scale}
    context = entry.shape.context_length - sum(leading_tokens(open_adapter(Path(folder)).config) for folder in folders)
    samples = _samples(records, tokenizer, template, system, context, notes)
    prompts = _prompts(records, tokenizer, template, system, context, notes)
    losses, counts = _losses(client, samples, len(records), adapters, progress)
    answers, answer_seconds = _answers(
        client,
        list(prompts.values()),
        tokenizer.stop_token_ids(template) if stop_ids is None else stop_ids,
        adapters,
        max_new_tokens,
        batch_size,
        progress,
    )
    texts = {index: tokenizer.decode(answer.ids) for index, answer in zip(prompts, answers, strict=True)}
    stopped = {index: answer.stopped_by for index, answer in zip(prompts, answers, strict=True)}
    cut = sum(reason == "length" for reason in stopped.values())
    if cut:
        notes.append(
            f"{cut} answers were cut at {max_new_tokens} tokens: a larger --max-new-tokens may change the scores"
        )
    references = {index: str(records[index].messages[-1]["content"]) for index in prompts}
    scores = score_answers([(texts[index], references[index]) for index in prompts]) if prompts else None
    scored = dict(zip(prompts, scores.rows, strict=True)) if scores else {}
    trained = sum(counts)
    answer_tokens = sum(len(answer.ids) for answer in answers)
    return Evaluation(
        records=len(records),
        loss=sum(loss * count for loss, count in zip(losses, counts, strict=True)) / trained if trained else None,
        trained_tokens=trained,
        scores=scores,
        rows=tuple(
            EvaluatedRecord(
                line=record.line,
                loss=losses[index] if counts[index] else None,
                reference=references.get(index),
                answer=texts.get(index),
                stopped_by=stopped.get(index),
                score=scored.get(index),
            )
            for index, record in enumerate(records)
        ),
        notes=tuple(notes),
        seconds=time.perf_counter() - begun,
        answer_tokens=answer_tokens,
        answer_tokens_per_second=answer_tokens / answer_seconds if answer_seconds > 0 else 0.0,
    )


def _usable_records(
    data: Path, format: Format | None, columns: dict[str, str] | None, limit: int | None, notes: list[str]
) -> list[Record]:
    records: list[Record] = []
    first_bad: BadRecord | None = None
    bad = 0
    for record in read_records(data, format, columns):
        if isinstance(record, BadRecord):
            first_bad, bad = first_bad or record, bad + 1
            continue
        records.append(record)
        if limit is not None and len(records) >= limit:
            break
    if first_bad is not None and records:
        notes.append(f"{bad} records cannot be used; the first is on line {first_bad.line}: it {first_bad.why}")
    if not records:
        why = f": {first_bad.why}" if first_bad else ""
        where = f"{data}:{first_bad.line}" if first_bad else str(data)
        raise BadInput(f"no usable record{why}", where=where, hint="See what is wrong: edgepeft data check FILE")
    return records


def _samples(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    system: str | None,
    longest: int,
    notes: list[str],
) -> list[_Sample]:
    """What the loss is taken of; samples that the model cannot take are noted and left out."""
    samples: list[_Sample] = []
    overlong = refused = 0
    for index, record in enumerate(records):
        train_on: TrainOn = "assistant" if record.messages else "all"
        try:
            encoded = encode_record(record, tokenizer, template, train_on, system=system)
        except RecordError:
            refused += 1
            continue
        for sample in encoded:
            if len(sample.ids) > longest:
                overlong += 1
            else:
                samples.append((index, sample.ids, sample.mask))
    if refused:
        notes.append(f"{refused} records are refused by the chat template")
    if overlong:
        notes.append(f"{overlong} samples are longer than the model's {longest:,} tokens: no loss for them")
    return samples


def _prompts(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    system: str | None,
    longest: int,
    notes: list[str],
) -> dict[int, list[int]]:
    """Index of the record → the tokens that its last answer follows."""
    prompts: dict[int, list[int]] = {}
    for index, record in enumerate(records):
        messages = list(record.messages)
        if not messages or messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls"):
            continue
        if system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        try:
            prompt = encode_prompt(messages[:-1], tokenizer, template, list(record.tools) or None)
        except RecordError:
            continue
        if len(prompt) < longest:
            prompts[index] = prompt
    if len(prompts) < len(records):
        rest = len(records) - len(prompts)
        notes.append(f"{rest} records are not answered: plain text, a tool call, or too long a prompt")
    return prompts


def _losses(
    client: SyncInference,
    samples: Sequence[_Sample],
    records: int,
    adapters: Sequence[AdapterUse],
    progress: Progress | None,
) -> tuple[list[float], list[int]]:
    """Mean loss and number of trained tokens of each record."""
    sums, counts = [0.0] * records, [0] * records
    begun = time.perf_counter()
    for start in range(0, len(samples), _LOSS_SAMPLES):
        part = samples[start : start + _LOSS_SAMPLES]
        scored = client.score_loss([(ids, mask) for _, ids, mask in part], adapters)
        for (index, _, mask), loss in zip(part, scored.losses, strict=True):
            # The first token is predicted from nothing and never counts.
            trained = sum(mask[1:])
            sums[index] += loss * trained
            counts[index] += trained
        _tell(progress, "losses", start + len(part), len(samples), begun)
    return [total / count if count else 0.0 for total, count in zip(sums, counts, strict=True)], counts


def _answers(
    client: SyncInference,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    adapters: Sequence[AdapterUse],
    max_new_tokens: int,
    batch_size: int,
    progress: Progress | None,
) -> tuple[list[Answer], float]:
    """The answers in the order of the prompts, and the seconds that they took."""
    if not prompts:
        return [], 0.0
    begun = time.perf_counter()
    answers: dict[int, Answer] = {}
    sampling = Sampling(temperature=0.0, max_new_tokens=max_new_tokens)
    for answer in client.generate_batch(prompts, stop_ids, sampling, adapters, batch_size=batch_size):
        answers[answer.index] = answer
        _tell(progress, "answers", len(answers), len(prompts), begun)
    return [answers[index] for index in range(len(prompts))], time.perf_counter() - begun


def _tell(progress: Progress | None, what: str, done: int, total: int, begun: float) -> None:
    if progress is None:
        return
    # Answers come in waves, a batch at a time: the first ones say little about the rest.
    eta = (time.perf_counter() - begun) / done * (total - done) if done >= _ETA_SHARE * total else None
    progress(EvaluationProgress(what, done, total, eta))
