"""Plans for models that are not on this disk: from a profile alone, marked as such, and never trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgepeft.cli.app import run
from edgepeft.errors import BadInput, ExitCode
from edgepeft.models.store import add_model
from edgepeft.plan.build import build, find_base
from edgepeft.plan.files import read_plan_toml, write_plan_toml
from edgepeft.plan.revise import revise
from edgepeft.runs.launch import launch

CARD = {"gpu": "rtx-4090-24gb"}


def end_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as leaving:
        run(list(arguments))
    out, err = capsys.readouterr()
    return int(leaving.value.code or 0), out, err


@pytest.mark.parametrize("name", ["llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct", "LLAMA-3.1-8B"])
def test_a_profile_is_planned_without_a_download(name: str) -> None:
    plan = build(name, None, dict(CARD))
    assert plan.spec.recipe.base.model == "llama-3.1-8b"
    assert plan.spec.recipe.base.architecture == "LlamaForCausalLM"
    assert plan.spec.recipe.max_seq_len == 2048
    assert plan.data is None
    note = next(note for note in plan.notes if "not on this disk" in note)
    assert "hf download meta-llama/Llama-3.1-8B " in note
    assert "cannot be trained yet" in note


def test_a_length_can_be_asked_for_without_data(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = end_of(capsys, "plan", "qwen3-8b", "--seq-len", "1000", "--gpu", "rtx-4090-24gb", "--json")
    assert code == 0
    assert json.loads(out)["spec"]["recipe"]["max_seq_len"] == 1000


def test_lengths_of_the_data_are_estimated_and_marked(alpaca_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = build("qwen2.5-7b", alpaca_file, dict(CARD))
    assert plan.data is not None
    assert plan.data.estimated
    assert plan.steps > 0
    assert plan.data.length_max < 200
    assert any("estimated from characters" in note for note in plan.notes)
    code, out, _ = end_of(capsys, "plan", "qwen2.5-7b", str(alpaca_file), "--gpu", "rtx-4090-24gb")
    assert code == 0
    assert "Lengths (estimated): median" in out


def test_a_model_on_this_disk_wins_over_a_profile_of_its_name(tiny_model: Path, alpaca_file: Path) -> None:
    add_model(tiny_model, name="llama-3.1-8b")
    plan = build("llama-3.1-8b", alpaca_file, {"gpu": "cpu"})
    assert plan.spec.recipe.base.fingerprint
    assert plan.data is not None
    assert not plan.data.estimated
    assert not any("not on this disk" in note for note in plan.notes)


def test_how_the_data_is_read_matters_as_ever(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("question,reply\n" + "".join(f"q{number},a much longer answer\n" for number in range(30)))
    with pytest.raises(BadInput):
        build("qwen2.5-7b", path, dict(CARD))
    columns = ["prompt=question", "completion=reply"]
    plan = build("qwen2.5-7b", path, CARD | {"map": columns, "format": "prompt-completion", "eval_fraction": 0.5})
    assert plan.data is not None
    assert plan.data.train_samples == plan.data.eval_samples == 15
    assert plan.spec.recipe.data.columns == {"prompt": "question", "completion": "reply"}


def test_training_says_how_to_bring_the_model(alpaca_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "smollm2-360m", str(alpaca_file), "--name", "x", "--gpu", "cpu", "--seq-len", "64"]
    code, _, err = end_of(capsys, *arguments)
    assert code == ExitCode.BAD_INPUT
    assert "hf download HuggingFaceTB/SmolLM2-360M " in err
    assert len(err.splitlines()) == 1


def test_a_plan_of_a_profile_is_not_launched_from_a_file_either(alpaca_file: Path, tmp_path: Path) -> None:
    plan = build("smollm2-360m", alpaca_file, {"gpu": "cpu", "max_seq_len": 64})
    write_plan_toml(plan, tmp_path / "p.toml")
    read = read_plan_toml(tmp_path / "p.toml")
    assert read.spec == plan.spec
    with pytest.raises(BadInput, match="hf download"):
        launch(read, "x")
    with pytest.raises(BadInput, match="not on this disk"):
        revise(read, where="p.toml")


def test_a_name_that_is_almost_known_suggests_what_can_be_planned() -> None:
    with pytest.raises(BadInput, match=r"no model is called 'llama-3\.1-9b'.*you can plan for llama-3\.1-"):
        find_base("llama-3.1-9b")
    with pytest.raises(BadInput, match=r"hf download someone/Llama-3\.1-8B-Mine .*you can plan for llama-3\.1-8b"):
        find_base("someone/Llama-3.1-8B-Mine")
    with pytest.raises(BadInput, match="no such file or folder") as caught:
        find_base("./llama-3.1-8b")
    assert "you can plan for" not in str(caught.value)


@pytest.mark.parametrize("model", ["llama-2-7b", "gemma-2-9b", "gemma-3-4b", "phi-4", "mistral-nemo-12b", "olmo-2-7b"])
def test_every_family_gets_a_plan(model: str, alpaca_file: Path) -> None:
    plan = build(model, alpaca_file, {"gpu": "rtx-5090-32gb"})
    assert plan.memory.peak_bytes <= (plan.spec.budget_bytes or 0)
