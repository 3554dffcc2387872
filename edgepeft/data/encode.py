"""Records as token ids with a loss mask.

The text of a whole sample is tokenized once, and trained spans are mapped onto tokens by character offsets: the ids
equal those of transformers' `apply_chat_template(tokenize=True)`, and no token boundary moves because of the mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import msgspec

from edgepeft.data.conversation import Message, RecordError
from edgepeft.data.records import Record
from edgepeft.data.template import ChatTemplate
from edgepeft.data.tokens import Tokenizer
from edgepeft.data.tool_text import fit_conversation
from edgepeft.spec import TrainOn

_MARK = "\ufdd2"
STRIPS_EARLIER_TURNS = (
    "the template renders earlier answers differently once a later turn follows: each answer became a sample of its own"
)


class Sample(msgspec.Struct, frozen=True):
    """What one forward pass sees."""

    ids: list[int]
    mask: list[bool]
    """Which tokens carry loss, as targets."""
    line: int
    """Line (in parquet: row) of the record it comes from."""


class Rendered(NamedTuple):
    """A sample before tokenization."""

    text: str
    spans: list[tuple[int, int]] | None
    """Trained character spans [begin, end), ascending; None trains everything."""
    line: int
    plain: bool
    """Plain text: the tokenizer's own beginning and the end-of-sequence token are added."""
    notes: tuple[str, ...] = ()


def encode_record(
    record: Record,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    train_on: TrainOn = "assistant",
    *,
    system: str | None = None,
) -> list[Sample]:
    """The samples of one record: one, or one for each answer where the template renders an answer differently later.

    Args:
        template: None is enough for plain text.
        system: put before a conversation that has no system message.

    Raises:
        RecordError: the template refuses the conversation; the message says why.
    """
    stops = frozenset(tokenizer.stop_token_ids(template))
    rendered = render_record(record, template, train_on, system=system)
    return [Sample(item.ids, item.mask, record.line) for item in tokenize(rendered, tokenizer, stops)]


def encode_prompt(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    tools: Sequence[dict[str, Any]] | None = None,
) -> list[int]:
    """The ids that a model continues with its next answer.

    Raises:
        RecordError: the template refuses the conversation; the message says why.
    """
    fitted = fit_conversation(messages, tools, template)
    return tokenizer.encode(template.render(fitted.messages, fitted.tools, add_generation_prompt=True))


def render_record(
    record: Record, template: ChatTemplate | None, train_on: TrainOn = "assistant", *, system: str | None = None
) -> list[Rendered]:
    """The texts of one record's samples with their trained spans.

    Raises:
        RecordError: the template refuses the conversation; the message says why.
    """
    if record.text is not None:
        return [Rendered(record.text, None, record.line, True)]
    if template is None:
        raise RecordError("a conversation needs a chat template")
    messages = list(record.messages)
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    fitted = fit_conversation(messages, record.tools, template)
    messages, tools = fitted.messages, fitted.tools
    if train_on == "all":
        return [Rendered(template.render(messages, tools), None, record.line, False, fitted.notes)]
    if template.has_generation_marks:
        text, spans = template.render_marked(messages, tools)
        if spans:
            return [Rendered(text, spans[record.context_answers :], record.line, False, fitted.notes)]
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    text = template.render(messages, tools)
    spans = []
    stable = True
    for at in answers:
        until = text if at == len(messages) - 1 else _try_render(template, messages[: at + 1], tools)
        if until is None or not text.startswith(until):
            stable = False
            break
        spans.append((_answer_begin(template, messages, at, tools, until), len(until)))
    trained = slice(record.context_answers, None)
    if stable:
        return [Rendered(text, spans[trained], record.line, False, fitted.notes)]
    notes = (*fitted.notes, STRIPS_EARLIER_TURNS)
    samples = []
    for at in answers[trained]:
        until = template.render(messages[: at + 1], tools)
        begin = _answer_begin(template, messages, at, tools, until)
        samples.append(Rendered(until, [(begin, len(until))], record.line, False, notes))
    return samples


class Tokenized(NamedTuple):
    """A rendered sample with its tokens."""

    rendered: Rendered
    ids: list[int]
    mask: list[bool]
    offsets: list[tuple[int, int]]
    """Characters [begin, end) of the text behind each token; empty for tokens that the tokenizer adds by itself."""


def tokenize(rendered: Sequence[Rendered], tokenizer: Tokenizer, stops: frozenset[int]) -> Iterator[Tokenized]:
    """Ids and masks of rendered samples, in order.

    Args:
        stops: tokens that end an answer; blanks that a template writes after one are not trained.
    """
    for plain, group in groupby(rendered, key=lambda item: item.plain):
        items = list(group)
        encodings = tokenizer.encode_batch([item.text for item in items], add_special_tokens=plain)
        for item, encoding in zip(items, encodings, strict=True):
            ids, offsets = list(encoding.ids), list(encoding.offsets)
            if plain and tokenizer.eos_id is not None and (not ids or ids[-1] != tokenizer.eos_id):
                ids.append(tokenizer.eos_id)
                offsets.append((len(item.text), len(item.text)))
            mask = [True] * len(ids) if item.spans is None else _mask(ids, offsets, item, stops)
            yield Tokenized(item, ids, mask, offsets)


def _mask(ids: list[int], offsets: Sequence[tuple[int, int]], item: Rendered, stops: frozenset[int]) -> list[bool]:
    """A token is trained when it shares a character with a span; an end token right after a span belongs to it."""
    mask = [False] * len(ids)
    index, count = 0, len(ids)
    for begin, end in item.spans or ():
        while index < count and offsets[index][1] <= begin:
            index += 1
        last_stop = -1
        while index < count and (
            offsets[index][0] < end or (offsets[index][0] == end and ids[index] in stops and last_stop < 0)
        ):
            mask[index] = True
            if ids[index] in stops:
                last_stop = index
            index += 1
        if last_stop >= 0 and not item.text[offsets[last_stop][1] : end].strip():
            mask[last_stop + 1 : index] = [False] * (index - last_stop - 1)
    return mask


def _answer_begin(
    template: ChatTemplate, messages: list[Message], at: int, tools: list[dict[str, Any]] | None, until: str
) -> int:
    """Where answer `at` begins in `until`, the text up to its end: after what prompts the model for it."""
    header = _try_render(template, messages[:at], tools, add_generation_prompt=True)
    if header is not None and until.startswith(header):
        return len(header)
    # The prompt says more than the finished text does, such as an opening <think> that is stripped later.
    answer = messages[at]
    if answer["content"]:
        marked = _try_render(template, [*messages[:at], {**answer, "content": _MARK + answer["content"]}], tools)
        begin = marked.find(_MARK) if marked is not None else -1
        if marked is not None and begin >= 0 and marked[:begin] == until[:begin]:
            return begin
    return _common_prefix(until, header or "")


def _try_render(
    template: ChatTemplate,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    *,
    add_generation_prompt: bool = False,
) -> str | None:
    try:
        return template.render(messages, tools, add_generation_prompt)
    except RecordError:
        return None


def _common_prefix(one: str, other: str) -> int:
    length = min(len(one), len(other))
    return next((at for at in range(length) if one[at] != other[at]), length)
