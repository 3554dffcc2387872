"""Scores of answers."""

from __future__ import annotations

import pytest

from edgepeft.chat.scoring import parse_object, score_answer, score_answers

REFERENCE = '{"severity": "high", "cause": {"kind": "disk", "full": true}, "steps": [1, 2]}'


def test_equal_objects_match_whatever_their_spelling() -> None:
    row = score_answer(' {"steps":[1,2.0], "cause":{"full":true,"kind":"disk"},"severity":"high"}\n', REFERENCE)
    assert (row.exact_match, row.valid_json, row.field_accuracy) == (True, True, 1.0)


def test_fields_are_the_leaves_of_the_reference() -> None:
    row = score_answer('{"severity": "low", "cause": {"kind": "disk"}, "steps": [1, 2], "more": 1}', REFERENCE)
    assert row.valid_json
    assert not row.exact_match
    assert row.field_accuracy == pytest.approx(0.5)
    assert row.wrong_fields == ("severity", "cause.full")


def test_a_field_too_many_is_not_exact() -> None:
    row = score_answer('{"a": 1, "b": 2}', '{"a": 1}')
    assert (row.exact_match, row.field_accuracy) == (False, 1.0)


@pytest.mark.parametrize(
    "answer",
    [
        f"```json\n{REFERENCE}\n```",
        f"Here it is: {REFERENCE}",
        REFERENCE[:-1],
        f"[{REFERENCE}]",
        '{"severity": NaN}',
        "",
    ],
)
def test_what_a_program_could_not_parse_has_no_field_right(answer: str) -> None:
    row = score_answer(answer, REFERENCE)
    assert (row.exact_match, row.valid_json, row.field_accuracy) == (False, False, 0.0)
    assert len(row.wrong_fields) == 4


def test_true_is_not_one() -> None:
    assert score_answer('{"a": 1}', '{"a": true}').field_accuracy == 0.0
    assert score_answer('{"a": [0]}', '{"a": [false]}').field_accuracy == 0.0
    assert score_answer('{"a": null}', '{"a": null}').exact_match


def test_text_references_are_only_compared() -> None:
    row = score_answer(" Paris\n", "Paris")
    assert (row.exact_match, row.valid_json, row.field_accuracy) == (True, None, None)
    scores = score_answers([("Paris", "Paris"), ("Rome", "Paris")])
    assert (scores.exact_match, scores.valid_json, scores.field_accuracy) == (0.5, None, None)


def test_means_are_over_the_records_that_have_the_measure() -> None:
    scores = score_answers([('{"a": 1}', '{"a": 1}'), ("no", '{"a": 1}'), ("x", "x")])
    assert (scores.count, scores.valid_json, scores.field_accuracy) == (3, 0.5, 0.5)
    assert scores.exact_match == pytest.approx(2 / 3)
    assert score_answers([]).exact_match == 0.0


def test_deep_nesting_is_not_a_crash() -> None:
    assert parse_object('{"a":' * 100_000) is None
