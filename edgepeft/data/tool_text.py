"""Fitting a conversation to what a chat template can show: what it has no place for is written into ordinary turns.

A template without tool support leaves tool calls out silently; training on that teaches empty answers.
The written form is the one that Hermes and Qwen models use.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from edgepeft.data.conversation import Message
from edgepeft.data.template import ChatTemplate

SYSTEM_FOLDED = "the template leaves system messages out: they are put before the first question"
TOOLS_WRITTEN = "the template has no place for tools: they are listed in the system message"
CALLS_WRITTEN = "the template has no place for tool calls: they are written as <tool_call>…</tool_call> into the answer"
RESULTS_WRITTEN = (
    "the template has no place for tool results: they are written as <tool_response>…</tool_response> into a user turn"
)


class Fitted(NamedTuple):
    """A conversation that the template shows in full."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    notes: tuple[str, ...]
    """What had to be changed, as sentences without a full stop."""


def fit_conversation(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, template: ChatTemplate
) -> Fitted:
    """Rewrites only what `template` could not show; the number and order of assistant turns stay."""
    fitted = [dict(message) for message in messages]
    notes: list[str] = []
    shown = list(tools) if tools else None
    if any(message.get("tool_calls") for message in fitted) and not template.shows_tool_calls:
        notes.append(CALLS_WRITTEN)
        for message in fitted:
            calls = message.pop("tool_calls", None)
            if calls:
                written = "\n".join(_call_text(call) for call in calls)
                message["content"] = f"{message['content']}\n{written}" if message["content"] else written
    if any(message["role"] == "tool" for message in fitted) and not template.shows_tool_results:
        notes.append(RESULTS_WRITTEN)
        fitted = _results_as_user(fitted)
    if shown and not template.shows_tools:
        notes.append(TOOLS_WRITTEN)
        fitted = _with_system(fitted, _tools_text(shown))
        shown = None
    if fitted and fitted[0]["role"] == "system" and not template.shows_system:
        notes.append(SYSTEM_FOLDED)
        system, *fitted = fitted
        if fitted and fitted[0]["role"] == "user":
            fitted[0]["content"] = f"{system['content']}\n\n{fitted[0]['content']}"
        else:
            fitted.insert(0, {"role": "user", "content": system["content"]})
    return Fitted(fitted, shown, tuple(notes))


def _with_system(messages: list[Message], text: str) -> list[Message]:
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _results_as_user(messages: list[Message]) -> list[Message]:
    """Consecutive results share one turn, since many templates insist on turns that alternate."""
    fitted: list[Message] = []
    joined = False
    for message in messages:
        if message["role"] != "tool":
            fitted.append(message)
            joined = False
            continue
        text = f"<tool_response>\n{message['content']}\n</tool_response>"
        if joined:
            fitted[-1]["content"] += "\n" + text
        else:
            fitted.append({"role": "user", "content": text})
        joined = True
    return fitted


def _call_text(call: dict[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"


def _tools_text(tools: list[dict[str, Any]]) -> str:
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "You may call functions. They are given as JSON schemas within <tools></tools>:\n"
        f"<tools>\n{listed}\n</tools>\n"
        'To call one, answer with <tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>'
    )
