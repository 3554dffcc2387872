"""Chat templates: how a conversation becomes the text that a model was made for. No torch and no transformers."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from edgepeft.data.conversation import Message, RecordError
from edgepeft.errors import BadInput

BUILT_IN = {
    "chatml": (
        "{%- for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "plain": (
        "{%- for message in messages %}{{ message['role'] | capitalize + ':\\n' + message['content'] }}"
        "{%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
        "{%- if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
    ),
}
"""Templates that need nothing from the model but, for `plain`, an end-of-sequence token."""
_DATE_CALL = re.compile(r"strftime_now\(\s*(?:\"([^\"]*)\"|'([^']*)')\s*\)")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE_CALL = {
    "type": "function",
    "id": "call00001",
    "function": {"name": "probe_call", "arguments": {"probe_key": "probe_value"}},
}
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "probe",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string", "description": "probe"}}},
    },
}
_USER: Message = {"role": "user", "content": "probe question"}
_ANSWER: Message = {"role": "assistant", "content": "probe answer"}


class ChatTemplate:
    """One model's chat template, or one that stands in for it.

    Args:
        texts: Jinja sources by name; `default`, and `tool_use` where a model has another one for tools.
        special_tokens: bos_token, eos_token … as the tokenizer's settings say.
        name: `model`, the name of a built-in one, or a path.
        day: what `strftime_now` tells; None is the day of the call.
    """

    def __init__(
        self,
        texts: Mapping[str, str],
        special_tokens: Mapping[str, str],
        *,
        name: str = "model",
        day: datetime.date | None = None,
    ) -> None:
        self.texts = dict(texts)
        self.special_tokens = dict(special_tokens)
        self.name = name
        self.day = day

    @classmethod
    def load(cls, folder: Path, override: str | None = None) -> ChatTemplate:
        """The template of the model in `folder`, or `override`: `chatml`, `plain`, or a file.

        Raises:
            BadInput: there is none, it cannot be read, or it is no Jinja template.
        """
        settings = _read_settings(folder)
        tokens = special_tokens(settings, folder)
        if override in BUILT_IN:
            if override == "plain" and "eos_token" not in tokens:
                raise BadInput(
                    "the plain template needs an end-of-sequence token, and the tokenizer names none", where=str(folder)
                )
            texts, name = {"default": BUILT_IN[override]}, override
        elif override is not None:
            texts, name = {"default": _read_text(Path(override))}, override
        else:
            texts, name = _model_texts(folder, settings), "model"
        if not texts:
            raise BadInput(
                "the model has no chat template",
                where=str(folder),
                hint="Give one with --template FILE, or use a built-in one: --template chatml or --template plain",
            )
        template = cls(texts, tokens, name=name)
        for text in template.texts.values():
            template._compile(text)
        return template

    @property
    def text(self) -> str:
        """The Jinja source used without tools."""
        return self.texts.get("default") or next(iter(self.texts.values()))

    @property
    def fingerprint(self) -> str:
        """`sha256:…` of `text`."""
        return "sha256:" + hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def key(self) -> str:
        """A digest of all that decides what `render` returns, the day included where it matters."""
        parts = [self.texts, self.special_tokens, str(self.day) if self.uses_date else ""]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def uses_date(self) -> bool:
        """Whether the rendered text depends on the day."""
        return any(re.search(r"strftime_now\s*\(", text) for text in self.texts.values())

    @property
    def has_generation_marks(self) -> bool:
        """Whether the template itself says what the assistant writes."""
        return any(_GENERATION.search(text) for text in self.texts.values())

    def freeze_date(self, day: datetime.date) -> ChatTemplate:
        """The same template with `day` for today; its `text` holds it wherever the date's form is written out."""
        moment = datetime.datetime.combine(day, datetime.time())

        def freeze(match: re.Match[str]) -> str:
            return json.dumps(moment.strftime(match[1] if match[1] is not None else match[2]))

        texts = {name: _DATE_CALL.sub(freeze, text) for name, text in self.texts.items()}
        return ChatTemplate(texts, self.special_tokens, name=self.name, day=day)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as text, as transformers' `apply_chat_template(tokenize=False)` renders it.

        Raises:
            RecordError: the template refuses the conversation.
        """
        return self._render(messages, tools, add_generation_prompt, marked=False)

    def render_marked(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the character spans [begin, end) that the template marks as generated.

        Raises:
            RecordError: the template refuses the conversation.
        """
        from edgepeft.data.sandbox import GENERATION_BEGIN, GENERATION_END

        spans: list[tuple[int, int]] = []
        pieces: list[str] = []
        length, begin = 0, 0
        for piece in re.split(
            f"([{GENERATION_BEGIN}{GENERATION_END}])", self._render(messages, tools, False, marked=True)
        ):
            if piece == GENERATION_BEGIN:
                begin = length
            elif piece == GENERATION_END:
                spans.append((begin, length))
            else:
                pieces.append(piece)
                length += len(piece)
        return "".join(pieces), spans

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None,
        add_generation_prompt: bool,
        *,
        marked: bool,
    ) -> str:
        import jinja2

        compiled, marks = self._compile(self._source(bool(tools)))
        marks.marking = marked
        try:
            rendered: str = compiled.render(
                {
                    **self.special_tokens,
                    "messages": [_visible(message) for message in messages],
                    "tools": list(tools) if tools else None,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise RecordError(
                f"the chat template refuses it: {' '.join(str(error).split()) or type(error).__name__}"
            ) from error
        finally:
            marks.marking = False
        return rendered

    def _source(self, with_tools: bool) -> str:
        return self.texts["tool_use"] if with_tools and "tool_use" in self.texts else self.text

    def _compile(self, text: str) -> Any:
        import jinja2

        from edgepeft.data.sandbox import compile_template

        if text not in self._compiled:
            try:
                self._compiled[text] = compile_template(text, self._strftime_now)
            except jinja2.TemplateSyntaxError as error:
                raise BadInput(
                    f"the chat template is not valid Jinja: {error.message}",
                    where=f"chat template {self.name!r}, line {error.lineno}",
                    hint="Correct it, or use another with --template FILE or --template chatml",
                ) from error
        return self._compiled[text]

    @cached_property
    def _compiled(self) -> dict[str, Any]:
        return {}

    def _strftime_now(self, form: str) -> str:
        day = self.day
        return (datetime.datetime.now() if day is None else datetime.datetime.combine(day, datetime.time())).strftime(
            form
        )

    @cached_property
    def shows_system(self) -> bool:
        """Whether a system message appears in the text."""
        return self._shows("probe system", [{"role": "system", "content": "probe system"}, _USER, _ANSWER])

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the schemas of tools appear in the text."""
        return self._shows("probe_tool", [_USER, _ANSWER], [_PROBE_TOOL])

    @cached_property
    def shows_tool_calls(self) -> bool:
        """Whether an assistant's tool call appears in the text."""
        call: Message = {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL]}
        result: Message = {"role": "tool", "content": "probe result", "tool_call_id": "call00001"}
        return any(
            self._shows("probe_value", [_USER, call, *rest], tools)
            for rest in ([], [result, _ANSWER])
            for tools in (None, [_PROBE_TOOL])
        )

    @cached_property
    def shows_tool_results(self) -> bool:
        """Whether what a tool returns appears in the text."""
        call: Message = {"role": "assistant", "content": "probe", "tool_calls": [_PROBE_CALL]}
        result: Message = {"role": "tool", "content": "probe result", "tool_call_id": "call00001"}
        return any(
            self._shows("probe result", [_USER, call if self.shows_tool_calls else _ANSWER, result, _ANSWER], tools)
            for tools in (None, [_PROBE_TOOL])
        )

    def _shows(self, needle: str, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> bool:
        try:
            return needle in self.render(messages, tools)
        except RecordError:
            return False


def special_tokens(settings: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """bos_token, eos_token and their like, from tokenizer_config.json, or else special_tokens_map.json."""
    legacy = _read_json(folder / "special_tokens_map.json")
    tokens: dict[str, str] = {}
    extra = settings.get("extra_special_tokens")
    for source in (legacy, extra if isinstance(extra, dict) else {}, settings):
        for key, value in source.items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                tokens[key] = content
    return tokens


def _read_settings(folder: Path) -> dict[str, Any]:
    return _read_json(folder / "tokenizer_config.json")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise BadInput(f"not readable as JSON: {error}", where=str(path), hint="Download the file again") from error
    return value if isinstance(value, dict) else {}


def _model_texts(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Files win over the settings, as in transformers."""
    texts: dict[str, str] = {}
    listed = settings.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(listed, str):
        texts["default"] = listed
    elif isinstance(listed, dict):
        texts.update({str(name): str(text) for name, text in listed.items()})
    elif isinstance(listed, list):
        texts.update(
            {
                item["name"]: item["template"]
                for item in listed
                if isinstance(item, dict) and {"name", "template"} <= item.keys()
            }
        )
    if (folder / "chat_template.jinja").is_file():
        texts["default"] = _read_text(folder / "chat_template.jinja")
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        texts[file.stem] = _read_text(file)
    return texts


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise BadInput(
            "no such template file",
            where=str(path),
            hint="Give a Jinja file, or one of the built-in templates chatml and plain",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"the template cannot be read: {error}", where=str(path), hint="Give a Jinja file in UTF-8"
        ) from error


def _visible(message: Message) -> Message:
    """What the template sees of a message: reasoning under the names in use, as transformers hands it over."""
    reasoning = message.get("reasoning_content")
    return {"thinking": reasoning, **message} if reasoning is not None else dict(message)
