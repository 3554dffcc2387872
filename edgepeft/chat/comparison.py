"""Texts that two forms of one model are compared on, as token ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from edgepeft.chat.setup import ChosenAdapter, choose_prompting
from edgepeft.data.conversation import RecordError
from edgepeft.data.encode import encode_prompt, encode_record
from edgepeft.data.records import BadRecord, read_records
from edgepeft.data.template import ChatTemplate
from edgepeft.data.tokens import Tokenizer
from edgepeft.errors import BadInput, EdgepeftError
from edgepeft.library.store import AdapterFolder
from edgepeft.models.store import ModelEntry
from edgepeft.spec import DataRef

MOST_PROMPTS = 8
MOST_TOKENS = 128
"""Of one prompt; what is beyond is cut off."""

BUILT_IN = (
    "Name three rivers of Europe and the sea that each flows into.",
    "Write a short note that says the meeting moved from Monday to Thursday, 14:30.",
    "What does this do? for i in range(3): print(i * i)",
    "Translate into French: The weather is fine today.",
    "A train leaves at 9:15 and needs 2 h 50 min. When does it arrive?",
    'Answer in JSON with the keys "city" and "country": Where is the Eiffel Tower?',
)
"""Questions of unlike kinds, for adapters whose own data is not at hand."""


class Prompts(msgspec.Struct, frozen=True):
    """What is compared on, and where it comes from."""

    ids: tuple[tuple[int, ...], ...]
    source: str
    """As a clause after `on`."""


def choose_prompts(entry: ModelEntry, chosen: ChosenAdapter, file: Path | None) -> Prompts:
    """Records of `file`, else of the adapter's held-out or training data where that is still there, else built-in ones.

    Conversations are rendered as the adapter learned them, answers included.

    Args:
        entry: the base.
        chosen: the adapter.
        file: a .txt with a prompt a line, or any file that `edgepeft data check` reads.

    Raises:
        BadInput: the file cannot be read, or holds nothing that can be used.
    """
    tokenizer, data = Tokenizer.load(Path(entry.folder)), _data_of(chosen.adapter)
    template = _template(entry, chosen)
    if file is not None:
        if not file.is_file():
            raise BadInput("there is no such file", where=str(file), hint="Give a text file with a prompt a line")
        found = tuple(_of_file(file, tokenizer, template, data))
        if not found:
            raise BadInput("holds no usable text", where=str(file), hint="See: edgepeft data check FILE")
        return Prompts(found, f"{len(found)} texts of {file.name}")
    if data is not None:
        for path, what in ((data.eval_path, "held-out"), (data.path, "training")):
            found = _of_data(path, tokenizer, template, data)
            if found:
                return Prompts(found, f"{len(found)} records of its {what} data")
    texts = tuple(tuple(ids[:MOST_TOKENS]) for ids in _built_in(tokenizer, template))
    return Prompts(texts, f"{len(texts)} built-in prompts")


def _data_of(adapter: AdapterFolder) -> DataRef | None:
    """What the adapter was trained on; None where nothing tells."""
    card = adapter.card
    return None if card is None or card.recipe is None else card.recipe.data


def _template(entry: ModelEntry, chosen: ChosenAdapter) -> ChatTemplate | None:
    try:
        return choose_prompting(entry, [chosen]).template
    except BadInput:
        # A base without one, and an adapter for plain text.
        return None


def _of_data(
    path: str | None, tokenizer: Tokenizer, template: ChatTemplate | None, data: DataRef
) -> tuple[tuple[int, ...], ...]:
    if not path or not Path(path).is_file():
        return ()
    try:
        return tuple(_of_file(Path(path), tokenizer, template, data))
    except EdgepeftError:
        # It may have changed since; other texts do as well.
        return ()


def _of_file(
    path: Path, tokenizer: Tokenizer, template: ChatTemplate | None, data: DataRef | None
) -> Iterator[tuple[int, ...]]:
    taken = 0
    for ids in _encoded(path, tokenizer, template, data):
        if ids:
            yield tuple(ids[:MOST_TOKENS])
            taken += 1
        if taken == MOST_PROMPTS:
            return


def _encoded(
    path: Path, tokenizer: Tokenizer, template: ChatTemplate | None, data: DataRef | None
) -> Iterator[list[int]]:
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput("cannot be read as text", where=str(path), hint="Save it as UTF-8") from error
        yield from (_prompt(line, tokenizer, template) for line in lines if line.strip())
        return
    own = data is not None and str(path) in (data.path, data.eval_path)
    form, columns = (data.format, data.columns) if data is not None and own else (None, None)
    for record in read_records(path, form, columns):
        if isinstance(record, BadRecord) or (record.messages and template is None):
            continue
        try:
            samples = encode_record(record, tokenizer, template, "all", system=data.system if data else None)
        except RecordError:
            continue
        yield from (sample.ids for sample in samples)


def _built_in(tokenizer: Tokenizer, template: ChatTemplate | None) -> Iterator[list[int]]:
    yield from (_prompt(text, tokenizer, template) for text in BUILT_IN)


def _prompt(text: str, tokenizer: Tokenizer, template: ChatTemplate | None) -> list[int]:
    if template is None:
        return tokenizer.encode(text)
    try:
        return encode_prompt([{"role": "user", "content": text}], tokenizer, template)
    except RecordError:
        return tokenizer.encode(text)
