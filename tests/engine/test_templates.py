"""Tokens and masks of the light side against transformers' `apply_chat_template`."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from edgepeft.data.conversation import Message
from edgepeft.data.encode import Sample, encode_prompt, encode_record
from edgepeft.data.records import Record
from edgepeft.data.template import ChatTemplate
from edgepeft.data.tokens import Tokenizer
from edgepeft.data.tool_text import fit_conversation
from templates import FOLDER, KINDS, write_model_folder

SINGLE = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris, a city on the Seine 🎉"},
]
SEVERAL = [
    {"role": "user", "content": "Wie ist das Wetter in Zürich?\n"},
    {"role": "assistant", "content": "Schön, 21 °C. "},
    {"role": "user", "content": "東京は?"},
    {"role": "assistant", "content": "  晴れです。"},
    {"role": "user", "content": "Thank you!"},
    {"role": "assistant", "content": "That is all <b>I</b> know & more 🎉🎉"},
]
SYSTEM = [{"role": "system", "content": "Answer in one sentence."}, *SEVERAL]
CALLS = [
    {"role": "user", "content": "Weather in Zürich?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "type": "function",
                "id": "call00001",
                "function": {"name": "get_weather", "arguments": {"city": "Zürich"}},
            }
        ],
    },
    {"role": "tool", "content": '{"temperature": 21}', "tool_call_id": "call00001"},
    {"role": "assistant", "content": "It is 21 °C."},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather <now>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CONVERSATIONS: dict[str, tuple[list[Message], list[dict[str, Any]] | None]] = {
    "single": (SINGLE, None),
    "several": (SEVERAL, None),
    "system": (SYSTEM, None),
    "calls": (CALLS, TOOLS),
}


class Side:
    """Both sides of the comparison for one kind of template."""

    def __init__(self, folder: Path, kind: str) -> None:
        from transformers import PreTrainedTokenizerFast

        self.folder = write_model_folder(folder, kind)
        self.tokenizer = Tokenizer.load(folder)
        self.template = ChatTemplate.load(folder).freeze_date(datetime.date(2026, 7, 26))
        self.oracle = PreTrainedTokenizerFast.from_pretrained(str(folder))

    def encode(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> list[Sample]:
        record = Record(1, tuple(messages), tuple(tools or ()))
        return encode_record(record, self.tokenizer, self.template)

    def expected(self, messages: list[Message], tools: list[dict[str, Any]] | None = None, **options: Any) -> list[int]:
        fitted = fit_conversation(messages, tools, self.template)
        found: list[int] = self.oracle.apply_chat_template(
            fitted.messages,
            tools=fitted.tools,
            chat_template=self.template.text,
            tokenize=True,
            return_dict=False,
            **options,
        )
        return found

    def trained(self, sample: Sample) -> str:
        """The trained tokens as text, spans parted by a bar."""
        spans: list[list[int]] = []
        for at, flag in enumerate(sample.mask):
            if flag and (at == 0 or not sample.mask[at - 1]):
                spans.append([])
            if flag:
                spans[-1].append(sample.ids[at])
        return "|".join(self.tokenizer.decode(span) for span in spans)


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Side]:
    root = tmp_path_factory.mktemp("templates")
    return {kind: Side(root / kind, kind) for kind in KINDS}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_those_of_transformers(sides: dict[str, Side], kind: str, name: str) -> None:
    side = sides[kind]
    messages, tools = CONVERSATIONS[name]
    samples = side.encode(messages, tools)
    assert samples[-1].ids == side.expected(messages, tools)
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    if len(samples) > 1:
        assert [sample.ids for sample in samples] == [side.expected(messages[: at + 1], tools) for at in answers]


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_has_the_ids_of_transformers_and_ends_where_the_mask_begins(
    sides: dict[str, Side], kind: str, name: str
) -> None:
    side = sides[kind]
    messages, tools = CONVERSATIONS[name]
    ids = encode_prompt(messages[:-1], side.tokenizer, side.template, tools)
    assert ids == side.expected(messages[:-1], tools, add_generation_prompt=True)
    last = side.encode(messages, tools)[-1]
    if last.ids[: len(ids)] == ids:
        assert last.mask[len(ids)]
        assert not last.mask[len(ids) - 1]


ENDS = {
    "smollm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "qwen25": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "mistral": "</s>",
    "marked": "<|im_end|>",
}


@pytest.mark.parametrize("kind", ["smollm2", "qwen25", "marked"])
def test_answers_and_their_end_are_trained_and_nothing_else(sides: dict[str, Side], kind: str) -> None:
    side = sides[kind]
    end = ENDS[kind]
    (sample,) = side.encode(SYSTEM)
    expected = [message["content"] + end for message in SYSTEM if message["role"] == "assistant"]
    assert side.trained(sample) == "|".join(expected)


def test_trimmed_answers_are_trained_as_they_are_rendered(sides: dict[str, Side]) -> None:
    (sample,) = sides["gemma"].encode(SYSTEM)
    assert sides["gemma"].trained(sample) == (
        "Schön, 21 °C.<end_of_turn>|晴れです。<end_of_turn>|That is all <b>I</b> know & more 🎉🎉<end_of_turn>"
    )
    (sample,) = sides["llama3"].encode(SEVERAL)
    assert sides["llama3"].trained(sample).startswith("Schön, 21 °C.<|eot_id|>|晴れです。<|eot_id|>|")
    (sample,) = sides["mistral"].encode(SEVERAL)
    assert sides["mistral"].trained(sample).startswith(" Schön, 21 °C.</s>| 晴れです。</s>|")


def test_calls_are_trained_and_results_are_not(sides: dict[str, Side]) -> None:
    (qwen,) = sides["qwen25"].encode(CALLS, TOOLS)
    call, answer = sides["qwen25"].trained(qwen).split("<|im_end|>|")
    assert call.strip() == '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
    assert answer == "It is 21 °C.<|im_end|>"
    (llama,) = sides["llama3"].encode(CALLS, TOOLS)
    assert sides["llama3"].trained(llama) == (
        '{"name": "get_weather", "parameters": {"city": "Zürich"}}<|eot_id|>|It is 21 °C.<|eot_id|>'
    )
    (mistral,) = sides["mistral"].encode(CALLS, TOOLS)
    assert sides["mistral"].trained(mistral).startswith('[TOOL_CALLS] [{"name": "get_weather"')
    (smol,) = sides["smollm2"].encode(CALLS, TOOLS)
    assert '"temperature"' not in sides["smollm2"].trained(smol)
    assert '<tool_call>\n{"name": "get_weather"' in sides["smollm2"].trained(smol)
    assert '"description": "The weather <now>"' in sides["smollm2"].tokenizer.decode(smol.ids)


def test_stripped_thinking_gives_one_sample_per_answer(sides: dict[str, Side]) -> None:
    side = sides["qwen3"]
    thinking = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "<think>\nfirst thought\n</think>\n\nOne."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "Two.", "reasoning_content": "second thought"},
    ]
    first, second = side.encode(thinking)
    assert side.trained(first) == "<think>\nfirst thought\n</think>\n\nOne.<|im_end|>"
    assert side.trained(second) == "<think>\nsecond thought\n</think>\n\nTwo.<|im_end|>"
    assert "first thought" not in side.tokenizer.decode(second.ids)
    assert second.ids == side.expected(thinking)


def test_a_template_that_moves_its_tools_gives_one_sample_per_answer(sides: dict[str, Side]) -> None:
    side = sides["mistral"]
    assert len(side.encode(SEVERAL)) == 1
    first, second = side.encode([*CALLS[:1], CALLS[3], *SINGLE], TOOLS)
    assert side.trained(first) == " It is 21 °C.</s>"
    assert side.trained(second) == " Paris, a city on the Seine 🎉</s>"
    assert second.ids == side.expected([*CALLS[:1], CALLS[3], *SINGLE], TOOLS)


def test_a_system_message_that_the_template_leaves_out_moves_into_the_first_question(sides: dict[str, Side]) -> None:
    for kind in ("gemma", "mistral"):
        (sample,) = sides[kind].encode(SYSTEM)
        text = sides[kind].tokenizer.decode(sample.ids)
        assert "Answer in one sentence.\n\nWie ist das Wetter" in text
        assert "Answer in" not in sides[kind].trained(sample)


def test_marks_give_the_mask_of_transformers(sides: dict[str, Side]) -> None:
    side = sides["marked"]
    for messages in (SINGLE, SEVERAL, SYSTEM):
        (sample,) = side.encode(messages)
        found = side.oracle.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        assert sample.ids == found["input_ids"]
        assert sample.mask == [bool(flag) for flag in found["assistant_masks"]]


@pytest.mark.parametrize("messages", [SINGLE, SEVERAL, SYSTEM], ids=["single", "several", "system"])
def test_growing_prefixes_give_the_mask_that_marks_give(sides: dict[str, Side], messages: list[Message]) -> None:
    side = sides["marked"]
    unmarked = side.template.text.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    template = ChatTemplate({"default": unmarked}, side.template.special_tokens)
    record = Record(1, tuple(messages))
    assert not template.has_generation_marks
    assert encode_record(record, side.tokenizer, template) == side.encode(messages)


def test_a_frozen_date_stays_in_the_text_and_equals_what_transformers_renders_from_it(sides: dict[str, Side]) -> None:
    side = sides["llama3"]
    assert ChatTemplate.load(side.folder).uses_date
    assert not side.template.uses_date
    assert '"26 Jul 2026"' in side.template.text
    rendered = side.oracle.apply_chat_template(SINGLE, chat_template=side.template.text, tokenize=False)
    assert "Today Date: 26 Jul 2026" in rendered
    assert rendered == side.template.render(SINGLE)


def test_smollm2_has_its_default_system_message(sides: dict[str, Side]) -> None:
    assert (
        sides["smollm2"]
        .template.render(SINGLE)
        .startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    )
    assert (FOLDER / "smollm2.jinja").is_file()
