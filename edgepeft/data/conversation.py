"""Every known shape of a conversation becomes one: role and content, tool calls as objects, tools as JSON schemas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Message = dict[str, Any]
"""role (system, user, assistant, tool), content (text), and where there are any: tool_calls, tool_call_id, name,
reasoning_content. What a chat template reads."""

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "function_call",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
_REASONING = ("reasoning_content", "thinking", "reasoning")


class RecordError(Exception):
    """A record cannot be used; the message is a clause that says why."""


class EmptyRecordError(RecordError):
    """A record lacks what would be asked, or what would be learned."""


def alpaca(fields: Mapping[str, Any]) -> list[Message]:
    """instruction, input and output (Taori et al. 2023) as a user turn and its answer, after `history` if any."""
    instruction, extra, output = (_text(fields, name) for name in ("instruction", "input", "output"))
    prompt = f"{instruction}\n\n{extra}" if instruction.strip() and extra.strip() else instruction or extra
    messages = _system(fields)
    history = fields.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RecordError("'history' is not a list of [question, answer] pairs")
    for question, answer in history:
        messages += [{"role": "user", "content": str(question)}, {"role": "assistant", "content": str(answer)}]
    if not prompt.strip():
        raise EmptyRecordError("'instruction' is empty")
    if not output.strip():
        raise EmptyRecordError("'output' is empty: there is nothing to learn")
    return [*messages, {"role": "user", "content": prompt}, {"role": "assistant", "content": output}]


def prompt_completion(fields: Mapping[str, Any], prompt: str, completion: str) -> tuple[list[Message], int]:
    """Two texts as one turn and its answer, or two lists of messages; and how many messages are context only."""
    asked, answered = fields[prompt], fields[completion]
    if isinstance(asked, list) and isinstance(answered, list):
        before, after = _messages(asked), _messages(answered)
        return before + after, len(before)
    question, answer = _text(fields, prompt), _text(fields, completion)
    if not question.strip():
        raise EmptyRecordError(f"{prompt!r} is empty")
    if not answer.strip():
        raise EmptyRecordError(f"{completion!r} is empty: there is nothing to learn")
    system = _system(fields)
    return [*system, {"role": "user", "content": question}, {"role": "assistant", "content": answer}], len(system) + 1


def sharegpt(fields: Mapping[str, Any]) -> list[Message]:
    """from/value turns; role/content turns under the same key are taken too."""
    turns = fields.get("conversations", fields.get("conversation"))
    messages = messages_form(turns)
    if messages[0]["role"] != "system":
        messages = _system(fields) + messages
    return messages


def messages_form(turns: Any) -> list[Message]:
    """A whole conversation of role/content or from/value turns."""
    if not isinstance(turns, list):
        raise RecordError("the conversation is not a list of turns")
    if not turns:
        raise EmptyRecordError("the conversation has no turns")
    messages = _messages(turns)
    if not any(
        message["content"].strip() or message.get("tool_calls")
        for message in messages
        if message["role"] == "assistant"
    ):
        if any(message["role"] == "assistant" for message in messages):
            raise EmptyRecordError("every assistant turn is empty: there is nothing to learn")
        raise EmptyRecordError("has no assistant turn: there is nothing to learn")
    return messages


def _messages(turns: list[Any]) -> list[Message]:
    messages: list[Message] = []
    calls = 0
    open_calls: list[str] = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping):
            raise RecordError(f"turn {number} is not an object with role and content")
        role = turn.get("role", turn.get("from"))
        if role is None:
            raise RecordError(f"turn {number} has no role")
        kind = _ROLES.get(str(role).strip().lower())
        if kind is None:
            raise RecordError(f"turn {number} has the unknown role {str(role)[:40]!r}")
        content = _content(turn.get("content", turn.get("value")), number)
        message: Message = {"role": "assistant" if kind == "function_call" else kind, "content": content}
        found = (
            _parse_calls(content, number) if kind == "function_call" else _given_calls(turn.get("tool_calls"), number)
        )
        if kind == "function_call":
            message["content"] = ""
        if found:
            open_calls = []
            for call in found:
                calls += 1
                # Mistral's templates insist on identifiers of nine letters and digits.
                call.setdefault("id", f"call{calls:05d}")
                open_calls.append(call["id"])
            message["tool_calls"] = found
        if kind == "tool":
            given = turn.get("tool_call_id") or (open_calls.pop(0) if open_calls else None)
            if given:
                message["tool_call_id"] = str(given)
        if turn.get("name"):
            message["name"] = str(turn["name"])
        reasoning = next((turn[key] for key in _REASONING if isinstance(turn.get(key), str)), None)
        if reasoning is not None and kind == "assistant":
            message["reasoning_content"] = reasoning
        messages.append(message)
    return messages


def _content(content: Any, number: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = []
        for part in content:
            if isinstance(part, str):
                parts.append(part)
            elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
                parts.append(part["text"])
            else:
                kind = part.get("type", "unknown") if isinstance(part, Mapping) else type(part).__name__
                raise RecordError(f"turn {number} has a part of type {kind!r}: only text can be trained")
        return "".join(parts)
    if isinstance(content, (Mapping, int, float)):
        return json.dumps(content, ensure_ascii=False)
    raise RecordError(f"turn {number} has content of type {type(content).__name__}")


def _parse_calls(text: str, number: int) -> list[dict[str, Any]]:
    """The text of a function_call turn: one call or a list of calls, as JSON."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecordError(f"turn {number} is a function call that is not valid JSON") from error
    calls = _given_calls(value if isinstance(value, list) else [value], number)
    if not calls:
        raise RecordError(f"turn {number} is a function call that calls nothing")
    return calls


def _given_calls(value: Any, number: int) -> list[dict[str, Any]]:
    if not value:
        return []
    if isinstance(value, str):
        return _parse_calls(value, number)
    if not isinstance(value, list):
        raise RecordError(f"turn {number} has tool_calls that are not a list")
    calls: list[dict[str, Any]] = []
    for item in value:
        function = item.get("function", item) if isinstance(item, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
            raise RecordError(f"turn {number} has a tool call without a function name")
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            # Templates print arguments as JSON: a text would come out quoted twice.
            try:
                decoded = json.loads(arguments) if arguments.strip() else {}
            except json.JSONDecodeError:
                decoded = arguments
            arguments = decoded if isinstance(decoded, dict) else arguments
        call: dict[str, Any] = {
            "type": "function",
            "function": {"name": name, "arguments": {} if arguments is None else arguments},
        }
        if isinstance(item.get("id"), str) and item["id"]:
            call["id"] = item["id"]
        calls.append(call)
    return calls


def read_tools(value: Any) -> list[dict[str, Any]]:
    """The `tools` of a record, a list or its JSON text, each as {"type": "function", "function": {…}}.

    Raises:
        RecordError: it is no list of functions.
    """
    if value is None or value == "" or value == []:
        return []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RecordError("'tools' is not valid JSON") from error
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise RecordError("'tools' is not a list of functions")
    tools: list[dict[str, Any]] = []
    for item in value or []:
        if not isinstance(item, Mapping) or not ("function" in item or "name" in item):
            raise RecordError("'tools' holds something that is not a function")
        tools.append(dict(item) if "function" in item else {"type": "function", "function": dict(item)})
    return tools


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is None:
        return ""
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, (list, dict, bool)):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _system(fields: Mapping[str, Any]) -> list[Message]:
    text = fields.get("system")
    return [{"role": "system", "content": text}] if isinstance(text, str) and text.strip() else []
