"""Which models fit which cards: the table is what the planner would choose, and reads well at any width."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from edgepeft.cli.app import run
from edgepeft.errors import UsageError
from edgepeft.models.described import describe_model, find_model_profile, load_models
from edgepeft.plan.device import profile_device
from edgepeft.plan.fits import ALL, CARDS, MODELS, Fit, find_bases, find_cards, fit_all
from edgepeft.plan.request import PlanRequest
from edgepeft.plan.search import make_plan
from edgepeft.profiles import find_gpu, find_preset

PRESET = find_preset("balanced")
PRECISIONS = ("nf4", "int8", "fp16", "bf16", "fp32")
"""Least exact first."""


@pytest.fixture(scope="module")
def table() -> dict[tuple[str, str], Fit]:
    found = fit_all(find_bases(()), find_cards(()), PRESET, 2048)
    return {(fit.model, fit.card): fit for fit in found}


def show(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as leaving:
        run(["fits", *arguments])
    assert leaving.value.code == 0
    return capsys.readouterr().out


def test_every_usual_size_is_described() -> None:
    assert [base.name for base in find_bases(())] == list(MODELS)
    assert [card.id for card in find_cards(())] == list(CARDS)
    assert len(find_bases([ALL])) == len(load_models())


def test_more_memory_never_makes_it_worse(table: dict[tuple[str, str], Fit]) -> None:
    for model in MODELS:
        ways = [table[model, card].way for card in CARDS]
        merits = [
            (way.max_seq_len, PRECISIONS.index(way.precision), way.rank) if way is not None else (0, 0, 0)
            for way in ways
        ]
        assert merits == sorted(merits), model


def test_what_fits_stays_within_the_card(table: dict[tuple[str, str], Fit]) -> None:
    for fit in table.values():
        if fit.way is not None:
            assert fit.way.least_bytes <= fit.budget_bytes < fit.card_bytes
            assert fit.shortened == (fit.way.max_seq_len < 2048)


@pytest.mark.parametrize(
    ("model", "card"),
    [("llama-3.1-8b", "rtx-3060-12gb"), ("qwen3-4b", "rtx-4060-8gb"), ("gemma-2-27b", "rtx-4090-24gb")],
)
def test_a_cell_is_what_the_planner_chooses(table: dict[tuple[str, str], Fit], model: str, card: str) -> None:
    device = profile_device(find_gpu(card))
    base = describe_model(find_model_profile(model))
    plan = make_plan(PlanRequest(base, PRESET, device, device.budget_bytes, overrides={"max_seq_len": 2048}))
    way = table[model, card].way
    assert way is not None
    recipe = plan.spec.recipe
    assert (way.precision, way.rank, way.max_seq_len) == (recipe.precision, recipe.method.rank, 2048)


def test_a_small_model_fits_every_card_and_a_huge_one_none_of_the_small(table: dict[tuple[str, str], Fit]) -> None:
    assert all(table["smollm2-135m", card].way is not None for card in CARDS)
    assert all(table["llama-3.1-70b", card].way is None for card in CARDS[:-1])


def test_cards_and_models_can_be_named_with_commas() -> None:
    assert [card.id for card in find_cards(["rtx-4090-24gb, cpu", "rtx-3060-12gb"])] == [
        "rtx-4090-24gb",
        "cpu",
        "rtx-3060-12gb",
    ]
    assert [base.name for base in find_bases(["phi-4,Qwen/Qwen3-8B"])] == ["phi-4", "qwen3-8b"]


def test_unknown_names_and_lengths_are_one_clear_line() -> None:
    with pytest.raises(UsageError, match=r"--models: unknown model 'lama-3\.1-8b'.*llama-3\.1-8b"):
        find_bases(["lama-3.1-8b"])
    with pytest.raises(UsageError, match="rtx-4090-24gb"):
        find_cards(["rtx4090"])
    with pytest.raises(UsageError, match="--seq-len"):
        fit_all(find_bases(["phi-4"]), find_cards(["cpu"]), PRESET, 1)


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_keeps_to_the_terminal(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgepeft.cli.output.console._width", width)
    lines = show(capsys, "--models", "smollm2-135m,mistral-small-24b,llama-3.1-70b").splitlines()
    assert max(map(len, lines)) <= width
    heads = [line for line in lines if line.startswith("model")]
    assert len(heads) == (2 if width == 80 else 1)
    assert " ".join(heads).count(" GB") == len(CARDS)
    assert sum(line.startswith("mistral-small-24b") for line in lines) == len(heads)


def test_the_legend_explains_every_word_that_occurs(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(show(capsys, "--models", "llama-3.1-8b").split())
    for word in ("nf4:", "int8:", "bf16:", "r16:", "(…):", "–: does not fit", "2,048 tokens", "preset balanced"):
        assert word in text
    text = " ".join(show(capsys, "--models", "smollm2-135m", "--gpu", "rtx-4090-24gb").split())
    assert "nf4:" not in text
    assert "does not fit" not in text


def test_markdown_is_one_table_with_its_legend(capsys: pytest.CaptureFixture[str]) -> None:
    lines = show(capsys, "--markdown", "--models", "smollm2-135m,llama-3.1-8b").splitlines()
    assert (
        lines[0]
        == "| model | " + " | ".join(f"{name.rsplit('-', 1)[1].removesuffix('gb')} GB" for name in CARDS) + " |"
    )
    assert lines[1] == "|---|" + "---|" * len(CARDS)
    assert {line.count("|") for line in lines[:4]} == {len(CARDS) + 2}
    assert lines[3].startswith("| llama-3.1-8b |")
    assert "rank 16" in "\n".join(lines[4:])


def test_json_has_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    found: list[Any] = json.loads(show(capsys, "--json", "--models", "phi-4", "--gpu", "rtx-4090-24gb"))
    fit = msgspec.convert(found[0], Fit)
    assert (len(found), fit.model, fit.card, fit.parameters) == (1, "phi-4", "rtx-4090-24gb", 14_659_507_200)
    assert fit.way is not None
