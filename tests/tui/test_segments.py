"""Cutting the drawing of long answers, and code out of them."""

from __future__ import annotations

import random

import pytest

from edgepeft_tui.chat.segments import LONGEST_CHARACTERS, LONGEST_LINES, Segments, code_blocks


def parts_of(text: str, *, pieces: int | None = None) -> list[str]:
    segments, parts = Segments(), [""]
    random_ = random.Random(pieces)
    at = 0
    while at < len(text):
        step = len(text) if pieces is None else random_.randint(1, pieces)
        going_on, *new = segments.push(text[at : at + step])
        parts[-1] += going_on
        parts += new
        at += step
    return parts


def test_short_answers_are_one_part() -> None:
    text = "Some words.\n\n- one\n- two\n"
    assert parts_of(text) == [text]


@pytest.mark.parametrize("pieces", [1, 7, 100, None])
def test_code_is_opened_again_in_each_part(pieces: int | None) -> None:
    lines = [f"line {number}\n" for number in range(3 * LONGEST_LINES)]
    parts = parts_of("```python\n" + "".join(lines) + "```\nend\n", pieces=pieces)
    assert len(parts) >= 3
    assert all(len(code_blocks(part)) == 1 and part.startswith("```python\n") for part in parts[:-1])
    assert "".join(block for part in parts for block in code_blocks(part)) == "".join(lines)
    assert parts[-1].endswith("end\n")


def test_lists_are_cut_between_items_and_tables_keep_their_head() -> None:
    items = "".join(f"- item {number}\n  more\n" for number in range(2 * LONGEST_LINES))
    parts = parts_of(items)
    assert "".join(parts) == items
    assert len(parts) > 2
    assert all(part.startswith("- item") for part in parts)
    head = "| a | b |\n|---|---|\n"
    parts = parts_of(head + "| 1 | 2 |\n" * 3 * LONGEST_LINES)
    assert len(parts) > 2
    assert all(part.startswith(head) for part in parts)


@pytest.mark.parametrize("pieces", [3, 1000, None])
def test_an_endless_line_is_cut_too(pieces: int | None) -> None:
    parts = parts_of("n" * 20 * LONGEST_CHARACTERS, pieces=pieces)
    assert "".join(parts) == "n" * 20 * LONGEST_CHARACTERS
    assert max(map(len, parts)) <= 4 * LONGEST_CHARACTERS


def test_code_blocks_are_found() -> None:
    text = "a\n```python\nx = '~~~'\n```\n~~~~\n```\n~~~\n~~~~\n``` not `code`\n```\nopen"
    assert code_blocks(text) == ["x = '~~~'\n", "```\n~~~\n", "open\n"]
