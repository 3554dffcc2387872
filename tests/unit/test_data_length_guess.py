"""Lengths without a tokenizer: near what tokenizers make, and the same records, splits and refusals as with one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgepeft.data.length_guess import GuessedSamples, guess_lengths
from edgepeft.data.prepare import describe_data, prepare
from edgepeft.data.token_guess import guess_tokens, token_positions
from edgepeft.errors import BadInput
from edgepeft.models.described import load_tokenizers

TOKENIZERS = load_tokenizers()
TEXTS = {
    "english": "The lighthouse keeper climbed the narrow stairs every evening, trimmed the wick, and wrote down the "
    "weather in a small book that nobody else was ever meant to read.",
    "json": '{"name": "open_valve", "arguments": {"id": 4711, "percent": 62.5, "force": false, "tags": ["north", '
    '"pump-3"]}}',
    "python": "def total(rows):\n    result = 0\n    for row in rows:\n        if row['kind'] == 'sale':\n"
    "            result += row['price'] * row['count']\n    return result\n",
    "german": "Die Leuchtturmwärterin stieg jeden Abend die schmale Treppe hinauf, putzte die Scheiben und schrieb das "
    "Wetter in ein kleines Heft, das außer ihr niemand lesen sollte.",
    "chinese": "灯塔看守人每天傍晚都爬上狭窄的楼梯，修剪灯芯，并把天气写进一本不打算给别人看的小本子里。",
    "russian": "Смотритель маяка каждый вечер поднимался по узкой лестнице, подрезал фитиль и записывал погоду в "
    "маленькую тетрадь, которую никто другой не должен был читать.",
    "numbers": "2024-11-05 17:42:09 4096 8192 131072 3.14159265 1000000",
}
COUNTED = {
    "llama-2": {"english": 39, "json": 49, "python": 48, "german": 48, "chinese": 73, "russian": 62, "numbers": 56},
    "llama-3": {"english": 34, "json": 44, "python": 42, "german": 51, "chinese": 47, "russian": 46, "numbers": 31},
    "qwen-2": {"english": 34, "json": 47, "python": 42, "german": 51, "chinese": 30, "russian": 53, "numbers": 55},
    "smollm2": {"english": 32, "json": 48, "python": 42, "german": 65, "chinese": 89, "russian": 116, "numbers": 55},
}
"""What the tokenizers themselves make of the texts; none of the texts was among those that the weights come from."""


@pytest.mark.parametrize("tokenizer", COUNTED)
@pytest.mark.parametrize("text", TEXTS)
def test_a_guess_is_near_what_the_tokenizer_makes(tokenizer: str, text: str) -> None:
    guessed = guess_tokens(TEXTS[text], TOKENIZERS[tokenizer].tokens)
    assert guessed == pytest.approx(COUNTED[tokenizer][text], rel=0.10 if text == "english" else 0.30)


def test_scripts_differ_by_tokenizer() -> None:
    text = TEXTS["chinese"]
    assert guess_tokens(text, TOKENIZERS["llama-2"].tokens) > 2 * guess_tokens(text, TOKENIZERS["qwen-2"].tokens)


def test_positions_rise_to_the_whole() -> None:
    weights = TOKENIZERS["llama-3"].tokens
    text = "<|im_start|>user\nHow far is it?<|im_end|>\n"
    positions = token_positions(text, weights)
    assert len(positions) == len(text) + 1
    assert (np.diff(positions) >= 0).all()
    assert positions[len("<|im_start|>")] == 1.0
    assert guess_tokens("", weights) == 0.0


@pytest.fixture
def mixed_file(tmp_path: Path) -> Path:
    rows = [
        {"instruction": f"Say {word} {number}", "output": f"{word} " * number}
        for number, word in enumerate(
            ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten") * 3, 1
        )
    ]
    broken = [{"instruction": "no answer"}, {"instruction": "", "output": ""}]
    lines = [*map(json.dumps, rows), *map(json.dumps, broken), "{not json"]
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_the_same_records_are_read_skipped_and_held_out_as_with_a_tokenizer(tiny_model: Path, mixed_file: Path) -> None:
    reference = describe_data(mixed_file)
    guessed = guess_lengths(reference, TOKENIZERS["llama-3"].tokens)
    prepared = prepare(reference, tiny_model)
    for name in ("format", "records", "samples", "bad", "unit", "first_bad", "large"):
        assert getattr(guessed.counts, name) == getattr(prepared.counts, name), name
    assert (len(guessed.train), len(guessed.held_out)) == (len(prepared.train), len(prepared.held_out))
    skipped = [note for note in guessed.notes if "are skipped" in note]
    assert skipped == [note for note in prepared.notes if "are skipped" in note]
    assert skipped
    # In the same order, though this tokenizer makes a token of each byte.
    assert np.corrcoef(guessed.train.lengths, prepared.train.lengths)[0, 1] > 0.9


def test_only_answers_are_trained_unless_all_is_asked_for(mixed_file: Path) -> None:
    weights = TOKENIZERS["llama-3"].tokens
    answers = guess_lengths(describe_data(mixed_file), weights).train
    everything = guess_lengths(describe_data(mixed_file, train_on="all"), weights).train
    assert (answers.trained < answers.lengths).all()
    assert (everything.trained == everything.lengths).all()
    assert answers.lengths.sum() == everything.lengths.sum()


def test_what_a_template_adds_to_each_conversation_is_added(mixed_file: Path) -> None:
    weights = TOKENIZERS["llama-3"].tokens
    bare, full = (guess_lengths(describe_data(mixed_file), weights, sample_tokens=count).train for count in (0, 26))
    assert (full.lengths == bare.lengths + 26).all()
    assert (full.trained == bare.trained).all()


def test_only_a_template_that_was_asked_for_is_told_of(tmp_path: Path) -> None:
    call = {"name": "open_valve", "arguments": {"id": 3}}
    messages = [
        {"role": "user", "content": "Open valve 3."},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
    ]
    path = tmp_path / "calls.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    weights = TOKENIZERS["qwen-2"].tokens
    assert guess_lengths(describe_data(path), weights).notes == ()
    (note,) = guess_lengths(describe_data(path, template="chatml"), weights).notes
    assert "no place for tool calls" in note


def test_a_held_out_file_is_read_too(mixed_file: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held.jsonl"
    held_out.write_text('{"instruction": "a", "output": "b"}\n', encoding="utf-8")
    guessed = guess_lengths(describe_data(mixed_file, eval_path=held_out), TOKENIZERS["qwen-2"].tokens)
    assert (len(guessed.train), len(guessed.held_out)) == (30, 1)


def test_plain_text_is_trained_whole_and_ends(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one two three"}\n' * 2 + '{"text": "four five six"}\n', encoding="utf-8")
    guessed = guess_lengths(describe_data(path, eval_fraction=0), TOKENIZERS["llama-3"].tokens, sample_tokens=1)
    assert list(guessed.train.lengths) == [5, 5, 5]
    assert list(guessed.train.trained) == [5, 5, 5]


def test_a_file_without_a_usable_record_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"instruction": "a"}\n', encoding="utf-8")
    with pytest.raises(BadInput, match=r"bad\.jsonl:1: no usable record"):
        guess_lengths(describe_data(path, format="alpaca"), TOKENIZERS["llama-3"].tokens)


@pytest.fixture
def samples() -> GuessedSamples:
    """A short one, one with its answer at the end, and one with its answer in the middle."""
    columns = ([10, 100, 50], [4, 60, 10], [10, 100, 30], [6, 40, 20])
    return GuessedSamples(*(np.array(values, np.int32) for values in columns))


def test_longer_samples_are_dropped_when_asked(samples: GuessedSamples) -> None:
    assert list(samples.limited(40, "drop").lengths) == [10]


def test_cut_samples_lose_their_end_and_those_without_an_answer_go(samples: GuessedSamples) -> None:
    cut = samples.limited(40, "truncate")
    assert list(cut.lengths) == [10, 40]
    assert list(cut.trained) == [6, 20]
    assert list(samples.limited(80, "truncate").trained) == [6, 20, 20]


def test_nothing_is_computed_behind_the_last_trained_token(samples: GuessedSamples) -> None:
    computed, trained = samples.trainable()
    assert list(computed) == [9, 99, 29]
    assert list(trained) == [6, 40, 20]
