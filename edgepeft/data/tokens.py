"""Tokens of a model without torch: tokenizer.json through the `tokenizers` package."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from edgepeft.data.conversation import RecordError
from edgepeft.data.template import ChatTemplate, _read_json, special_tokens
from edgepeft.errors import BadInput

_CONTROL = re.compile(r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>\s]{1,40}｜>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>")


class Tokenizer:
    """A model's tokenizer. Encoding adds no tokens that the text does not name, as `apply_chat_template` does.

    Use `Tokenizer.load`.
    """

    def __init__(self, backend: Any, folder: Path, source: bytes) -> None:
        self.backend = backend
        self.folder = folder
        self.fingerprint = "sha256:" + hashlib.sha256(source).hexdigest()
        """Of tokenizer.json."""
        self._settings = _read_json(folder / "tokenizer_config.json")
        self._generation = _read_json(folder / "generation_config.json")

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """The tokenizer of the model in `folder`.

        Raises:
            BadInput: there is no tokenizer.json, or it cannot be read.
        """
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Backend

        path = folder / "tokenizer.json"
        if not path.is_file():
            old = next(
                (name for name in ("tokenizer.model", "vocab.json", "spiece.model") if (folder / name).is_file()), None
            )
            what = (
                f"the model folder has no tokenizer.json, only {old}"
                if old
                else "the model folder has no tokenizer.json"
            )
            raise BadInput(what, where=str(folder), hint="Download the model's tokenizer.json into it")
        source = path.read_bytes()
        try:
            backend = Backend.from_str(source.decode("utf-8"))
        except Exception as error:  # the Rust side raises a bare Exception for a malformed file
            raise BadInput(
                f"not a readable tokenizer: {' '.join(str(error).split())}", where=str(path), hint="Download it again"
            ) from error
        # What a file says about cutting and padding is for another use than ours.
        backend.no_truncation()
        backend.no_padding()
        settings = _read_json(folder / "tokenizer_config.json")
        for token_id, token in sorted(settings.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
            if backend.token_to_id(token["content"]) is None and int(token_id) == backend.get_vocab_size():
                flags = {
                    key: token[key]
                    for key in ("single_word", "lstrip", "rstrip", "normalized", "special")
                    if key in token
                }
                backend.add_tokens([AddedToken(token["content"], **flags)])
        return cls(backend, folder, source)

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary, added ones included."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def embedding_rows(self) -> int | None:
        """Rows of the model's embedding as config.json says; None when it does not."""
        config = _read_json(self.folder / "config.json")
        rows = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
        return rows if isinstance(rows, int) else None

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token … as the settings say."""
        return special_tokens(self._settings, self.folder)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens."""
        return frozenset(index for index, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def added_ids(self) -> frozenset[int]:
        """Ids of all tokens that were added to the learned vocabulary, control tokens among them."""
        return frozenset(self.backend.get_added_tokens_decoder())

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The ids of `text`; control tokens that are written in it become what they name."""
        return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[Any]:
        """One `tokenizers.Encoding` (ids, and offsets in characters) for each text."""
        return list(self.backend.encode_batch(list(texts), add_special_tokens=add_special_tokens))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `ids`."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_id(self, token: str) -> int | None:
        """The id of one token, by its exact text."""
        found = self.backend.token_to_id(token)
        return None if found is None else int(found)

    @cached_property
    def eos_id(self) -> int | None:
        """The end-of-sequence token of the settings, or else the first one of generation_config.json."""
        named = self.special_tokens.get("eos_token")
        found = self.token_id(named) if named else None
        return found if found is not None else next(iter(self._generation_eos()), None)

    def stop_token_ids(self, template: ChatTemplate | None = None) -> tuple[int, ...]:
        """Tokens that end an answer: those of generation_config.json, eos_token, and the template's end of turn."""
        found = dict.fromkeys(self._generation_eos())
        if self.eos_id is not None:
            found[self.eos_id] = None
        if template is not None:
            end = end_of_turn_id(self, template)
            if end is not None:
                found[end] = None
        return tuple(found)

    def _generation_eos(self) -> list[int]:
        value = self._generation.get("eos_token_id")
        listed = value if isinstance(value, list) else [value]
        return [item for item in listed if isinstance(item, int)]


def end_of_turn_id(tokenizer: Tokenizer, template: ChatTemplate) -> int | None:
    """The control token that the template writes after an answer; None when it writes none."""
    answer = "probe-answer"
    try:
        text = template.render([{"role": "user", "content": "probe"}, {"role": "assistant", "content": answer}])
    except RecordError:
        return None
    _, found, tail = text.rpartition(answer)
    if not found:
        return None
    return next((token for token in tokenizer.encode(tail) if token in tokenizer.added_ids), None)


def untrained_tokens(tokenizer: Tokenizer, template: ChatTemplate) -> list[str]:
    """What speaks against the template's control tokens, one clause each; empty when nothing does.

    A control token that the vocabulary lacks is cut into ordinary pieces that the model never saw in that place, and
    one beyond the embedding's rows cannot be looked up at all.
    """
    try:
        text = template.render(
            [{"role": "user", "content": "probe"}, {"role": "assistant", "content": "probe"}],
            add_generation_prompt=True,
        )
    except RecordError:
        return []
    problems = []
    for token in dict.fromkeys(_CONTROL.findall(text)):
        # Mistral's early models and Llama 2 write these in ordinary pieces.
        if tokenizer.token_id(token) is None and not token.startswith(("[", "<<")):
            problems.append(f"the template writes {token}, which is no token of this model: it was never trained")
    rows = tokenizer.embedding_rows
    if rows is not None:
        for index in dict.fromkeys(tokenizer.encode(text)):
            if index >= rows:
                problems.append(f"the template writes token {index}, and the model has only {rows} embeddings")
    for key, token in tokenizer.special_tokens.items():
        if key in ("bos_token", "eos_token") and tokenizer.token_id(token) is None:
            problems.append(f"{key} is {json.dumps(token, ensure_ascii=False)}, which is not in the vocabulary")
    return problems
