"""`edgepeft data check` and `data preview` as a person runs them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgepeft.cli.app import app
from edgepeft.errors import BadInput, UsageError


def run(*arguments: object) -> tuple[str, BaseException | None]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.stdout, result.exception


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    path = tmp_path / "mixed.jsonl"
    rows = [{"instruction": "Say hi", "output": "hi\tthere"}, *[{"instruction": "x", "output": ""}] * 5]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_check_tells_counts_and_bad_records(tiny_model: Path, mixed: Path) -> None:
    text, error = run("data", "check", mixed, "--model", tiny_model, "--max-bad", 2)
    assert error is None
    assert "mixed.jsonl: alpaca, jsonl" in text
    assert "1 usable, 5 bad (5 of them empty)" in text
    assert text.count("'output' is empty") == 2
    assert "… and 3 more" in text
    assert "█" in text


def test_check_as_json_lists_everything(tiny_model: Path, mixed: Path) -> None:
    text, _ = run("data", "check", mixed, "--model", tiny_model, "--max-bad", 2, "--json")
    found = json.loads(text)["survey"]
    assert [record["line"] for record in found["bad"]] == [2, 3, 4, 5, 6]
    assert found["trained_tokens"] == 9


def test_check_fails_where_training_would(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text('{"instruction": "x", "output": ""}\n')
    text, error = run("data", "check", tmp_path / "none.jsonl", "--model", tiny_model)
    assert "none.jsonl:1" in text
    assert isinstance(error, BadInput)
    (tmp_path / "cut.json").write_text('[{"text": "a"},\n{"te')
    _, error = run("data", "check", tmp_path / "cut.json", "--model", tiny_model)
    assert isinstance(error, BadInput)
    assert error.where.endswith("cut.json:2")


def test_preview_shows_the_mask_blanks_and_control_tokens(tiny_model: Path, mixed: Path) -> None:
    text, error = run("data", "preview", mixed, "--model", tiny_model)
    assert error is None
    assert "<|im_start|>user↵\nSay·hi<|im_end|>↵\n<|im_start|>assistant↵\n⟦hi→there<|im_end|>⟧↵\n" in text
    assert "record 1, line 1: 9 of" in text
    assert "record 2, line 2 cannot be used: 'output' is empty" in text


def test_preview_of_one_record_with_ids_and_as_json(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("question,label\nfirst,one\nsecond,é\n", encoding="utf-8")
    columns = ("--map", "prompt=question", "--map", "completion=label")
    text, error = run("data", "preview", path, "--model", tiny_model, *columns, "--record", 2, "--ids")
    assert error is None
    lines = [line.split() for line in text.splitlines()]
    assert any(words[-1] == "é" and words[1].count(",") == 1 and "⟦" in words for words in lines if words)
    text, _ = run("data", "preview", path, "--model", tiny_model, *columns, "--line", 3, "--json")
    (shown,) = json.loads(text)["records"]
    (sample,) = shown["samples"]
    assert "".join(piece["text"] for piece in sample["pieces"] if piece["trained"]) == "é<|im_end|>"
    assert sum(len(piece["ids"]) for piece in sample["pieces"]) == sample["tokens"]
    _, error = run("data", "preview", path, "--model", tiny_model, *columns, "--record", 9)
    assert isinstance(error, BadInput)


@pytest.mark.parametrize(
    "options",
    [("--map", "prompt"), ("--map", "prompt=a", "--map", "prompt=b"), ("--train-on", "users"), ("--format", "x")],
)
def test_options_that_cannot_be_meant(tiny_model: Path, mixed: Path, options: tuple[str, ...]) -> None:
    _, error = run("data", "check", mixed, "--model", tiny_model, *options)
    assert isinstance(error, UsageError)


def test_no_torch(tiny_model: Path, mixed: Path) -> None:
    import subprocess

    code = (
        "import sys; from edgepeft.cli.app import app; "
        f"app(['data', 'check', {str(mixed)!r}, '--model', {str(tiny_model)!r}], standalone_mode=False); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, timeout=60).returncode == 0
