"""How near answers come to their references: exact match, valid JSON, and the share of right fields.

An answer is valid when the whole of it, but for white space around it, is one JSON object: a fenced block or a sentence
before it is what a program that reads the answer would trip over. Fields are the leaves of the reference's object; an
answer that cannot be parsed has none of them right.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import msgspec


class Row(msgspec.Struct, frozen=True):
    """The score of one answer."""

    exact_match: bool
    """Equal JSON objects when both parse, else equal text but for white space around it."""
    valid_json: bool | None = None
    """Whether the answer is a JSON object; None when the reference is not one."""
    field_accuracy: float | None = None
    """Share of the reference's fields that the answer has right; None when the reference is not JSON."""
    wrong_fields: tuple[str, ...] = ()
    """Paths of the reference's fields that are missing or differ."""


class Scores(msgspec.Struct, frozen=True):
    """Means over all answers, as fractions."""

    count: int
    exact_match: float
    valid_json: float | None
    """None when no reference is a JSON object."""
    field_accuracy: float | None
    """None when no reference is a JSON object."""
    rows: tuple[Row, ...]


def score_answers(pairs: Iterable[tuple[str, str]]) -> Scores:
    """Scores (answer, reference) pairs; an empty input scores 0."""
    rows = tuple(score_answer(answer, reference) for answer, reference in pairs)
    valid = [row.valid_json for row in rows if row.valid_json is not None]
    fields = [row.field_accuracy for row in rows if row.field_accuracy is not None]
    return Scores(
        count=len(rows),
        exact_match=_mean([row.exact_match for row in rows]),
        valid_json=_mean(valid) if valid else None,
        field_accuracy=_mean(fields) if fields else None,
        rows=rows,
    )


def score_answer(answer: str, reference: str) -> Row:
    """Scores one answer."""
    wanted = parse_object(reference)
    if wanted is None:
        return Row(exact_match=answer.strip() == reference.strip())
    given = parse_object(answer)
    wanted_fields = flatten(wanted)
    given_fields = flatten(given) if given is not None else {}
    wrong = tuple(
        path
        for path, value in wanted_fields.items()
        if path not in given_fields or not same_value(given_fields[path], value)
    )
    return Row(
        exact_match=given is not None and not wrong and given_fields.keys() == wanted_fields.keys(),
        valid_json=given is not None,
        field_accuracy=1 - len(wrong) / len(wanted_fields) if wanted_fields else float(given == wanted),
        wrong_fields=wrong,
    )


def parse_object(text: str) -> dict[str, Any] | None:
    """The JSON object that `text` is; None when it is anything else."""
    try:
        value = json.loads(text.strip(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Path → leaf: `{"a": {"b": 1}}` becomes `{"a.b": 1}`; lists and empty objects are leaves."""
    fields: dict[str, Any] = {}
    for key, inner in value.items():
        path = f"{prefix}{key}"
        if isinstance(inner, dict) and inner:
            fields.update(flatten(inner, f"{path}."))
        else:
            fields[path] = inner
    return fields


def same_value(first: Any, second: Any) -> bool:
    """Equality as JSON means it: `true` is not `1`, and `1.0` is `1`."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(same_value, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same_value(first[key], second[key]) for key in first)
    return bool(first == second)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _mean(values: list[Any]) -> float:
    return sum(float(value) for value in values) / len(values) if values else 0.0
