"""Options as texts: what the UI keeps is what the command line parses, and the command that it shows says the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgepeft.cli import plan as plan_command
from edgepeft.cli.app import run
from edgepeft.cli.plan_options import PlanOptions
from edgepeft.demo.tour import pinned_options
from edgepeft.errors import DoesNotFit, UsageError
from edgepeft.methods import METHODS
from edgepeft.models.store import add_model
from edgepeft.plan.build import build, make_request
from edgepeft.plan.options import OPTIONS, command_line, method_options, spelt_options, typed_options
from edgepeft.plan.sources import Sources

VALUES = {
    "gpu": "cpu",
    "budget": "2GiB",
    "intent": "quality",
    "precision": "bf16",
    "rank": "8",
    "alpha": "12.5",
    "targets": "q_proj, v_proj",
    "dropout": "5 %",
    "rank-stabilised": "yes",
    "max-seq-len": "1,024",
    "epochs": "2",
    "warmup": "0.1",
    "learning-rate": "2e-4",
    "deterministic": "yes",
    "seed": "3",
    "max-time": "30m",
    "sample-prompt": "-what's up | two words",
    "eval-fraction": "0.2",
    "train-on": "all",
    "system": 'it\'s [/x] a "test"',
    "template": "chatml",
}


def parsed(monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> tuple[str, Path | None, dict[str, Any]]:
    """What the command line's own parser makes of a command."""
    seen: list[tuple[str, Path | None, dict[str, Any]]] = []

    def record(model: str, data: Path | None, overrides: dict[str, Any], *, verify: bool = False) -> Any:
        seen.append((model, data, overrides))
        raise DoesNotFit("enough seen")

    monkeypatch.setattr(plan_command, "build_plan", record)
    assert argv[0] == "edgepeft"
    with pytest.raises(SystemExit):
        run(argv[1:])
    return seen[0]


def test_there_is_an_option_for_each_of_the_command_line() -> None:
    names = {name.rstrip("_").replace("_", "-") for name in PlanOptions.__struct_fields__}
    assert set(OPTIONS) == names
    assert all(option.help for option in OPTIONS.values())


@pytest.mark.parametrize("verb", ["plan", "train"])
def test_the_command_says_what_was_set(monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    command = command_line("llama-3.1-8b", "/data/my file.jsonl", VALUES, None if verb == "plan" else "mine")
    assert command[1] == verb
    model, data, overrides = parsed(monkeypatch, command)
    assert (model, data) == ("llama-3.1-8b", Path("/data/my file.jsonl"))
    assert overrides == typed_options(VALUES)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"rank": "8", "alpha": "12.5", "targets": "q_proj", "dropout": "5 %", "rank-stabilised": "yes"},
        {"method": "bottleneck", "reduction": "8", "placement": "houlsby"},
        {"method": "prefix", "tokens": "4", "reparameterised": "no"},
        {"ranks": "q_proj:4,down_proj:8", "max-seq-len": "64", "epochs": "1.5", "sample-prompt": "a | b"},
        {"system": "be [brief]", "train-on": "all", "eval-fraction": "0.2", "seed": "7"},
    ],
)
def test_the_command_makes_the_same_plan(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, alpaca_file: Path, values: dict[str, str]
) -> None:
    add_model(tiny_model, name="tiny")
    values = {"gpu": "cpu", "budget": "2GiB", **values}
    shown = build("tiny", alpaca_file, typed_options(values))
    model, data, overrides = parsed(monkeypatch, command_line("tiny", str(alpaca_file), values))
    assert build(model, data, overrides).spec == shown.spec


def test_spelling_and_reading_are_each_others_inverse() -> None:
    typed = pinned_options(Path("/data/held out.jsonl"), 3)
    assert typed_options(spelt_options(typed)) == typed
    assert typed_options(spelt_options({"set": ["reduction=8"]})) == {"set": ["reduction=8"]}


@pytest.mark.parametrize("values", [{"rank": "many"}, {"rank": "8.5"}, {"learning-rate": "fast"}, {"warmup": "x %"}])
def test_what_is_no_number_is_refused_by_its_name(values: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(values))}"):
        typed_options(values)


def test_settings_of_every_method_are_known() -> None:
    for name, method in METHODS.items():
        fields = {field.replace("_", "-") for field in method.config_type.__struct_fields__}
        assert set(method_options(name)) == fields
    assert method_options("bottleneck")["placement"].words == ("houlsby", "pfeiffer", "parallel")
    assert method_options("lora")["dora"].kind == "switch"


def test_sources_are_read_once_until_a_file_changes(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, alpaca_file: Path
) -> None:
    add_model(tiny_model, name="tiny")
    import edgepeft.data.prepare as preparing

    read: list[str] = []
    prepare = preparing.prepare
    monkeypatch.setattr(preparing, "prepare", lambda data, *a, **k: read.append(data.path) or prepare(data, *a, **k))
    sources = Sources()
    options = {"gpu": "cpu", "budget": "2GiB"}
    first = make_request("tiny", alpaca_file, options, sources=sources)
    second = make_request("tiny", alpaca_file, {**options, "rank": 4}, sources=sources)
    assert len(read) == 1
    assert second.lengths is first.lengths
    make_request("tiny", alpaca_file, {**options, "train_on": "all"}, sources=sources)
    assert len(read) == 2
    alpaca_file.write_text(alpaca_file.read_text() * 2)
    third = make_request("tiny", alpaca_file, options, sources=sources)
    assert len(read) == 3
    assert third.data != first.data
    sources.forget()
    make_request("tiny", alpaca_file, options, sources=sources)
    assert len(read) == 4
