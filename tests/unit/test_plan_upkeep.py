"""What a run does beside learning: as typed, as decided, as refused, and as a file says it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from edgepeft.cli.app import app
from edgepeft.errors import BadInput, EdgepeftError, UsageError
from edgepeft.hardware.measured import Measured, store_measured
from edgepeft.hardware.packages import read_packages
from edgepeft.plan.build import build
from edgepeft.plan.files import read_plan_toml, write_plan_toml
from edgepeft.plan.pins import check_pins
from edgepeft.plan.revise import revise
from edgepeft.plan.train_plan import TrainPlan
from edgepeft.plan.upkeep import PATIENCE_SHARE
from edgepeft.runs.launch import needed_disk_bytes
from edgepeft.spec import Upkeep


def planned(model: Path, data: Path, **typed: Any) -> TrainPlan:
    return build(str(model), data, {"gpu": "cpu", "budget": "1GiB", "rank": 4} | typed)


def shown(plan: TrainPlan) -> dict[str, tuple[str, str]]:
    return {choice.what: (choice.value, choice.origin) for choice in plan.choices}


def test_nothing_of_it_is_done_unless_it_is_asked_for(tiny_model: Path, alpaca_file: Path) -> None:
    plan = planned(tiny_model, alpaca_file)
    upkeep = plan.spec.upkeep
    assert (upkeep.early_stop, upkeep.keep, upkeep.max_seconds, upkeep.sample_prompts) == (0, "last", None, ())
    assert not {"early-stop", "keep", "max-time", "sample-prompt"} & shown(plan).keys()
    assert upkeep.eval_every_steps == plan.steps // 4


def test_early_stopping_evaluates_often_enough_and_keeps_the_best(tiny_model: Path, alpaca_file: Path) -> None:
    plan = planned(tiny_model, alpaca_file, early_stop=3)
    upkeep = plan.spec.upkeep
    assert (upkeep.early_stop, upkeep.keep) == (3, "best")
    assert upkeep.eval_every_steps == plan.steps // (3 * PATIENCE_SHARE)
    assert shown(plan)["early-stop"] == ("3", "user")
    assert shown(plan)["keep"] == ("best", "auto")
    assert shown(plan)["eval-every"] == (str(upkeep.eval_every_steps), "auto")
    last = planned(tiny_model, alpaca_file, early_stop=3, keep="last", eval_every=5)
    assert (last.spec.upkeep.keep, last.spec.upkeep.eval_every_steps) == ("last", 5)
    assert shown(last)["keep"] == ("last", "user")
    few = planned(tiny_model, alpaca_file, early_stop=9, max_steps=4)
    assert few.spec.upkeep.eval_every_steps == 1
    # One more checkpoint has to find room.
    assert needed_disk_bytes(plan) > needed_disk_bytes(last)


def test_a_time_and_prompts(tiny_model: Path, alpaca_file: Path) -> None:
    plan = planned(tiny_model, alpaca_file, max_time="90m", sample_prompt=["Repeat the number 4.", "[b]Hi"])
    assert plan.spec.upkeep.max_seconds == 5400.0
    assert plan.spec.upkeep.sample_prompts == ("Repeat the number 4.", "[b]Hi")
    assert shown(plan)["max-time"] == ("1 h 30 min", "user")
    assert shown(plan)["sample-prompt"] == ("2 prompts", "user")


@pytest.mark.parametrize(
    ("typed", "option", "said"),
    [
        ({"early_stop": -1}, "--early-stop", "whole number"),
        ({"early_stop": 2, "eval_every": 0}, "--early-stop", "needs evaluations"),
        ({"early_stop": 2, "eval_every": 5000}, "--early-stop", "none in"),
        ({"early_stop": 2, "eval_fraction": 0.0}, "--early-stop", "there are none"),
        ({"keep": "best", "eval_every": 0}, "--keep", "needs evaluations"),
        ({"keep": "best", "eval_fraction": 0.0}, "--keep", "there are none"),
        ({"keep": "first"}, "--keep", "best, last"),
        ({"max_time": "30"}, "--max-time", "90s, 30min or 2h"),
        ({"max_time": "0s"}, "--max-time", "cannot read"),
        ({"max_time": "soon"}, "--max-time", "cannot read"),
        ({"sample_prompt": ["a", " "]}, "--sample-prompt", "empty"),
        ({"sample_prompt": ["a"] * 9}, "--sample-prompt", "at most 8"),
    ],
)
def test_what_cannot_be_meant(
    tiny_model: Path, alpaca_file: Path, typed: dict[str, Any], option: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        planned(tiny_model, alpaca_file, **typed)
    assert caught.value.where == option


@pytest.mark.parametrize(("text", "seconds"), [("30m", 1800), ("30min", 1800), ("45s", 45), ("1.5h", 5400)])
def test_units_of_time(text: str, seconds: float) -> None:
    assert check_pins({"max_time": text})["max_time"] == seconds


def test_the_command_takes_them_and_the_file_gives_them_back(
    tiny_model: Path, alpaca_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p.toml"
    options = ["--gpu", "cpu", "--budget", "1GiB", "--early-stop", "2", "--max-time", "30m", "--keep", "best"]
    prompts = ["--sample-prompt", "one", "--sample-prompt", 'two = "2"']
    command = ["plan", str(tiny_model), str(alpaca_file), *options, *prompts, "--json", "--out", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)["spec"]["upkeep"]
    assert (told["early_stop"], told["keep"], told["max_seconds"]) == (2, "best", 1800.0)
    plan = read_plan_toml(out)
    assert plan.spec.upkeep.sample_prompts == ("one", 'two = "2"')
    assert revise(plan, where="p.toml") == plan
    missing = CliRunner().invoke(app, [*command, "--sample-prompt", ""])
    assert missing.exit_code != 0


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"early_stop": -1}, "early_stop"),
        ({"max_seconds": 0.0}, "max_seconds"),
        ({"max_seconds": float("nan")}, "max_seconds"),
        ({"sample_prompts": ("a",) * 9}, "sample_prompts"),
        ({"sample_prompts": ("",)}, "sample_prompts"),
        ({"early_stop": 1, "eval_every_steps": 0}, "early_stop"),
        ({"keep": "best", "eval_every_steps": 0}, "keep"),
    ],
)
def test_an_edit_that_cannot_be_meant_is_named(
    tiny_model: Path, alpaca_file: Path, changes: dict[str, Any], key: str
) -> None:
    plan = planned(tiny_model, alpaca_file)
    upkeep = msgspec.structs.replace(plan.spec.upkeep, **changes)
    edited = msgspec.structs.replace(plan, spec=msgspec.structs.replace(plan.spec, upkeep=upkeep))
    with pytest.raises(BadInput, match=rf"p\.toml, spec\.upkeep\.{key}"):
        revise(edited, where="p.toml")


def test_an_edit_is_marked(tiny_model: Path, alpaca_file: Path, tmp_path: Path) -> None:
    plan = planned(tiny_model, alpaca_file, max_time="1h")
    path = tmp_path / "p.toml"
    write_plan_toml(plan, path)
    path.write_text(path.read_text().replace("max_seconds = 3600.0", "max_seconds = 7200.0"))
    revised = revise(read_plan_toml(path), where="p.toml")
    assert shown(revised)["max-time"] == ("2 h 00 min", "user")
    assert revised.spec.upkeep.max_seconds == 7200.0


def test_a_plan_of_before_has_none_of_it(tiny_model: Path, alpaca_file: Path) -> None:
    plan = planned(tiny_model, alpaca_file)
    stored = json.loads(msgspec.json.encode(plan))
    for added in ("early_stop", "keep", "max_seconds", "sample_prompts"):
        del stored["spec"]["upkeep"][added]
    assert msgspec.convert(stored, TrainPlan).spec == plan.spec
    assert Upkeep().keep == "last"


def measure_cpu(flops: float) -> None:
    torch = read_packages().torch or ""
    store_measured(Measured("cpu", "CPU", torch, "2026-11-24T10:00:00+00:00", flops, "bf16", 1e10, None, None, None))


def test_a_time_that_is_too_short_is_told_and_counted(tiny_model: Path, alpaca_file: Path) -> None:
    measure_cpu(1e7)
    whole = planned(tiny_model, alpaca_file, max_steps=80)
    assert whole.seconds is not None
    assert whole.seconds > 600
    short = planned(tiny_model, alpaca_file, max_steps=80, max_time="5m")
    assert short.seconds is not None
    assert 300 < short.seconds < whole.seconds
    (note,) = (note for note in short.notes if "training time of 5 min" in note)
    assert f"of {short.steps}" in note
    assert any(choice.what == "time" and choice.why.endswith("ended by max-time") for choice in short.choices)
    long = planned(tiny_model, alpaca_file, max_steps=80, max_time="30d")
    assert long.seconds == whole.seconds
    assert not [note for note in long.notes if "training time of" in note]


def test_the_evaluation_of_the_base_takes_time(tiny_model: Path, alpaca_file: Path) -> None:
    measure_cpu(1e8)
    seconds = {
        every: planned(tiny_model, alpaca_file, max_steps=12, eval_every=every).seconds for every in (0, 12, 6, 4)
    }
    none, one, two = (seconds[every] or 0.0 for every in (0, 6, 4))
    assert seconds[12] == none
    each = one - none
    assert each > 0
    assert two - one == pytest.approx(each)
    without = planned(tiny_model, alpaca_file, max_steps=12, eval_fraction=0.0)
    assert without.spec.upkeep.eval_every_steps == 0


def test_plans_without_data_take_them_too(tiny_model: Path) -> None:
    try:
        plan = build(str(tiny_model), None, {"gpu": "cpu", "budget": "1GiB", "early_stop": 2, "max_time": "1h"})
    except EdgepeftError as error:
        pytest.fail(str(error))
    assert plan.spec.upkeep.early_stop == 2
