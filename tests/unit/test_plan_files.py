"""Plans as files and as text, and the command that makes them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import pytest
import tomli_w
from typer.testing import CliRunner

from edgepeft.cli.app import app, run
from edgepeft.cli.plan_options import PlanOptions
from edgepeft.errors import BadInput, DoesNotFit, UsageError
from edgepeft.hardware.packages import read_packages
from edgepeft.memory.breakdown import Breakdown
from edgepeft.memory.calibration import observe, observed
from edgepeft.memory.dry_run import DryRun
from edgepeft.plan.build import build, parse_map
from edgepeft.plan.explain import explain, phase_bar
from edgepeft.plan.files import read_plan_toml, write_plan_toml
from edgepeft.plan.revise import revise
from edgepeft.plan.train_plan import TrainPlan


@pytest.fixture
def plan(tiny_model: Path, alpaca_file: Path) -> TrainPlan:
    return build(str(tiny_model), alpaca_file, {"gpu": "cpu", "budget": "1GiB", "rank": 4})


def test_toml_and_json_give_the_same_plan_back(plan, tmp_path):
    write_plan_toml(plan, tmp_path / "p.toml")
    assert read_plan_toml(tmp_path / "p.toml") == plan
    assert msgspec.json.decode(msgspec.json.encode(plan), type=TrainPlan) == plan


def test_an_edited_value_is_read(plan, tmp_path):
    path = tmp_path / "p.toml"
    write_plan_toml(plan, path)
    path.write_text(path.read_text().replace("seed = 0", "seed = 7"))
    assert read_plan_toml(path).spec.recipe.seed == 7


def edited(plan, path, **values) -> Path:
    write_plan_toml(plan, path)
    lines = path.read_text().splitlines()
    for key, value in values.items():
        place = next(index for index, line in enumerate(lines) if line.startswith(f"{key} = "))
        lines[place] = f"{key} = {value}"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_an_untouched_file_is_the_plan_it_was(plan, tmp_path):
    assert revise(read_plan_toml(edited(plan, tmp_path / "p.toml")), where="p.toml") == plan


def test_an_edited_spec_is_counted_again(plan, tiny_model, alpaca_file, tmp_path):
    path = edited(plan, tmp_path / "p.toml", rank=8, samples_per_step=2)
    revised = revise(read_plan_toml(path), where="p.toml")
    layout = plan.spec.layout
    meant = {
        "rank": 8,
        "alpha": plan.spec.recipe.method.alpha,
        "samples_per_step": 2,
        "epochs": plan.spec.recipe.epochs,
        "micro_batch_tokens": layout.micro_batch_tokens,
        "checkpointing": layout.checkpointing,
        "loss_chunk_tokens": layout.loss_chunk_tokens,
    }
    planned = build(str(tiny_model), alpaca_file, {"gpu": "cpu", "budget": "1GiB"} | meant)
    assert (revised.memory, revised.steps, revised.data) == (planned.memory, planned.steps, planned.data)
    assert revised.memory.peak_bytes != plan.memory.peak_bytes
    assert revised.steps > plan.steps
    marked = {choice.what: choice for choice in revised.choices}
    assert (marked["rank"].value, marked["rank"].origin) == ("8", "user")
    assert "edited" in marked["rank"].why
    assert marked["precision"] in plan.choices
    assert any("edited" in note for note in revised.notes)


def test_an_edited_optimizer_is_kept_and_marked(plan, tmp_path):
    path = edited(plan, tmp_path / "p.toml", lora_plus_ratio=4.0)
    revised = revise(read_plan_toml(path), where="p.toml")
    assert revised.spec.recipe.optimizer.lora_plus_ratio == 4
    assert {choice.what: choice.origin for choice in revised.choices}["lora-plus-ratio"] == "user"
    assert revised.memory == plan.memory


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_seq_len", 100_000),
        ("max_seq_len", 1),
        ("samples_per_step", 0),
        ("micro_batch_tokens", -5),
        ("epochs", "nan"),
        ("learning_rate", 0.0),
        ("eval_fraction", 1.5),
        ("rank", 1000),
        ("lora_plus_ratio", 0.5),
        ("keep_checkpoints", 0),
    ],
)
def test_an_edit_that_cannot_be_meant_is_named(plan, tmp_path, key, value):
    with pytest.raises(BadInput, match=rf"p\.toml, .*{key}"):
        revise(read_plan_toml(edited(plan, tmp_path / "p.toml", **{key: value})), where="p.toml")


def of_another_method(plan, path, method: dict[str, object], **values) -> Path:
    edited(plan, path, **values)
    content = tomllib.loads(path.read_text())
    content["spec"]["recipe"]["method"] = method
    path.write_text(tomli_w.dumps(content))
    return path


def test_another_method_by_hand_is_what_the_plan_then_shows(plan, tmp_path):
    path = of_another_method(plan, tmp_path / "p.toml", {"type": "bottleneck", "reduction": 8.0})
    revised = revise(read_plan_toml(path), where="p.toml")
    shown = {choice.what: choice for choice in revised.choices}
    assert (shown["method"].value, shown["reduction"].value) == ("bottleneck", "8")
    assert not {"rank", "alpha", "targets", "dropout"} & shown.keys()
    assert any("[spec] was edited" in note for note in revised.notes)
    path = of_another_method(plan, tmp_path / "d.toml", {"type": "lora", "rank": 4, "alpha": 8.0, "dora": True})
    shown = {choice.what: choice for choice in revise(read_plan_toml(path), where="d.toml").choices}
    assert shown["dora"].value == "yes"
    assert "method" not in shown


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ({"type": "full"}, {"precision": '"nf4"'}, r"spec\.recipe\.precision: a 4-bit base"),
        ({"type": "ia3"}, {"lora_plus_ratio": 4.0}, r"lora_plus_ratio: LoRA\+ gives"),
    ],
)
def test_a_method_by_hand_must_suit_the_rest(plan, tmp_path, method, values, message):
    path = of_another_method(plan, tmp_path / "p.toml", method, **values)
    with pytest.raises(BadInput, match=message):
        revise(read_plan_toml(path), where="p.toml")


def test_lora_plus_is_for_lora(tiny_model, alpaca_file):
    with pytest.raises(UsageError, match="--lora-plus-ratio: LoRA\\+ gives LoRA's B another learning rate"):
        build(str(tiny_model), alpaca_file, {"gpu": "cpu", "method": "bottleneck", "lora_plus_ratio": 4.0})


def test_an_edit_beyond_the_budget_does_not_fit(plan, tmp_path):
    path = edited(plan, tmp_path / "p.toml", budget_bytes=100_000)
    with pytest.raises(DoesNotFit, match="more than the budget"):
        revise(read_plan_toml(path), where="p.toml")


def test_a_plan_over_data_that_changed_is_refused(plan, alpaca_file):
    alpaca_file.write_text(alpaca_file.read_text() * 2)
    with pytest.raises(BadInput, match=r"alpaca\.jsonl: the training file has changed"):
        revise(plan, where="p.toml")


def test_a_length_that_leaves_no_sample_is_told(tiny_model, alpaca_file):
    with pytest.raises(BadInput, match="no sample is left"):
        build(str(tiny_model), alpaca_file, {"gpu": "cpu", "max_seq_len": 3})


@pytest.mark.parametrize(
    ("data", "gpu", "code", "told"),
    [(False, "cpu", 3, "without data"), (True, "rtx-4090-24gb", 6, "not in this machine")],
)
def test_a_plan_that_cannot_run_here_is_refused_in_one_line(
    tiny_model, alpaca_file, tmp_path, capfd, data, gpu, code, told
):
    made = build(str(tiny_model), alpaca_file if data else None, {"gpu": gpu, "max_seq_len": 64})
    write_plan_toml(made, tmp_path / "p.toml")
    with pytest.raises(SystemExit) as ended:
        run(["train", "--plan", str(tmp_path / "p.toml"), "--name", "elsewhere"])
    out, err = capfd.readouterr()
    assert ended.value.code == code
    assert out == ""
    assert told in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("samples_per_step =", "sample_per_step =", "sample_per_step"),
        ("steps =", "steppes =", "steppes"),
        ("rank = 4", 'rank = "four"', "rank"),
        ("rank = 4", "rank = 0", "rank"),
        ("[spec.recipe]", "[spec.recipe", "TOML"),
    ],
)
def test_a_wrong_key_is_named(plan, tmp_path, old, new, told):
    path = tmp_path / "p.toml"
    write_plan_toml(plan, path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(BadInput, match=told):
        read_plan_toml(path)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(BadInput, match="cannot be read"):
        read_plan_toml(tmp_path / "none.toml")


@pytest.mark.parametrize("width", [80, 120])
def test_text_fits_the_terminal_and_says_everything(plan, width):
    lines = [text for text, _ in explain(plan, width)]
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for choice in plan.choices:
        assert f"  {choice.what} " in text
    assert "train step" in text
    assert "budget of 1.00 GiB" in " ".join(text.split())


@pytest.mark.parametrize("width", [80, 120])
def test_a_dry_run_is_shown_beside_the_prediction(plan, width):
    step = next(phase for phase in plan.memory.phases if phase.name == "train step")
    more = {**step.bytes_by_category, "saved activations": step.bytes_by_category["saved activations"] + (1 << 20)}
    grown = msgspec.structs.replace(step, bytes_by_category=more, place="backward of layer 2")
    phases = tuple(grown if phase is step else phase for phase in plan.memory.phases)
    found = DryRun(Breakdown(phases), 30, (3, 4), 1.5, "2.13.0", "cpu")
    shown = msgspec.structs.replace(plan, dry_run=found, wants_more={"larger micro-batches": 3 << 30})
    lines = [text for text, _ in explain(shown, width)]
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    assert "3 and 4 of 30 layers" in text
    assert re.search(r"saved activations [\d.]+ [\d.]+ \+1\.00", text)
    assert re.search(r"train step [\d.]+ [\d.]+ \+[\d.]+ %", text)
    assert "(backward of layer 2)" in text
    assert "A larger budget would bring larger micro-batches from 3.00 GiB on." in text
    same = msgspec.structs.replace(shown, memory=found.memory)
    assert "difference" not in " ".join(text for text, _ in explain(same, width))


def test_bars_are_as_long_as_they_should_be(plan):
    for phase in plan.memory.phases:
        assert len(phase_bar(phase, plan.memory.peak_bytes, 40)) == 40
    assert "·" not in phase_bar(plan.memory.peak, plan.memory.peak_bytes, 40)
    assert phase_bar(plan.memory.peak, 2 * plan.memory.peak_bytes, 40).count("·") == 20


def test_settings_are_overridden_in_order(tiny_model, alpaca_file, monkeypatch):
    from edgepeft.settings import store_setting

    def budget(**typed):
        made = build(str(tiny_model), alpaca_file, {"gpu": "cpu", **typed})
        return next((choice.value, choice.origin, choice.why) for choice in made.choices if choice.what == "budget")

    assert budget()[1] == "auto"
    store_setting("budget", "3GiB")
    assert budget() == ("3.00 GiB", "config", "set in config.toml")
    monkeypatch.setenv("EDGEPEFT_BUDGET", "2GiB")
    assert budget() == ("2.00 GiB", "config", "set by EDGEPEFT_BUDGET")
    assert budget(budget="1GiB") == ("1.00 GiB", "user", "as typed")


def test_a_card_that_is_not_here_can_be_planned_for(tiny_model):
    made = build(str(tiny_model), None, {"gpu": "rtx-4090-24gb", "max_seq_len": 128})
    assert made.spec.device == "rtx-4090-24gb"
    assert any("not in this machine" in note for note in made.notes)


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ({"budget": "5"}, "no unit"),
        ({"budget": "-1GiB"}, "not above zero"),
        ({"budget": "9000TiB"}, "more than all RAM"),
        ({"gpu": "rtx-9999"}, "unknown GPU"),
        ({"gpu": "7"}, "no card 7"),
        ({"intent": "best"}, "unknown preset"),
        ({"map": ["a"]}, "there is no data"),
    ],
)
def test_settings_that_cannot_be_meant(tiny_model, typed, told):
    with pytest.raises(UsageError, match=told):
        build(str(tiny_model), None, {"gpu": "cpu"} | typed)


def test_budget_too_small(tiny_model, alpaca_file):
    with pytest.raises(DoesNotFit, match="more than the budget"):
        build(str(tiny_model), alpaca_file, {"gpu": "cpu", "budget": "100kB"})


def test_what_is_trained_on_is_a_known_word(tiny_model, alpaca_file):
    with pytest.raises(UsageError, match="--train-on"):
        build(str(tiny_model), alpaca_file, {"gpu": "cpu", "train_on": "answers"})


def test_map_pairs():
    assert parse_map(["prompt=question", " a = b "]) == {"prompt": "question", "a": "b"}
    with pytest.raises(UsageError, match="--map"):
        parse_map(["prompt"])


def test_only_what_was_typed_is_an_override():
    assert PlanOptions().typed() == {}
    assert PlanOptions(rank=4, learning_rate=1e-3).typed() == {"rank": 4, "learning_rate": 1e-3}


def test_the_command_prints_json_and_writes_toml(tiny_model, alpaca_file, tmp_path):
    out = tmp_path / "p.toml"
    options = ["--gpu", "cpu", "--budget", "1GiB", "--seq-len", "48", "--lr", "1e-3", "--json", "--out", str(out)]
    result = CliRunner().invoke(app, ["plan", str(tiny_model), str(alpaca_file), *options])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["spec"]["recipe"]["max_seq_len"] == 48
    assert told["spec"]["recipe"]["optimizer"]["learning_rate"] == 1e-3
    assert read_plan_toml(out).spec.recipe.max_seq_len == 48


def test_planning_imports_no_torch(tiny_model, alpaca_file):
    code = (
        "import sys; from edgepeft.cli.app import run\n"
        "try: run(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "bad = {'torch', 'transformers', 'bitsandbytes', 'accelerate'} & set(sys.modules)\n"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    arguments = ["plan", str(tiny_model), str(alpaca_file), "--gpu", "cpu", "--budget", "1GiB"]
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "Plan for tiny-model on the CPU" in ended.stdout


def test_a_plan_of_an_older_version_is_read(plan):
    stored = json.loads(msgspec.json.encode(plan))
    for added in ("operations", "wants_more", "workload", "dry_run"):
        del stored[added]
    for other in stored["alternatives"]:
        del other["seconds"]
    old = msgspec.convert(stored, TrainPlan)
    assert (old.spec, old.memory, old.workload, old.dry_run) == (plan.spec, plan.memory, None, None)
    assert revise(old, where="plan.json").memory == plan.memory


def measure(plan: TrainPlan, measured_bytes: int) -> None:
    """A run of the plan that took twenty seconds and this much memory."""
    made = observed(
        plan.spec,
        plan.memory,
        run="a-1",
        device_name="some CPU",
        torch=read_packages().torch or "",
        measured_bytes=measured_bytes,
        operations=plan.operations,
        seconds=20.0,
        tokens_per_second=500.0,
    )
    observe(made)


def test_what_runs_taught_since_is_not_called_an_edit(plan):
    measure(plan, plan.memory.peak_bytes + 50_000)
    revised = revise(plan, where="p.toml")
    # Each category is rounded by itself.
    assert revised.memory.peak_bytes == pytest.approx(plan.memory.peak_bytes + 50_000, abs=5)
    assert any("More is known" in note for note in revised.notes)
    assert not any("edited" in note for note in revised.notes)


def test_a_plan_is_made_with_what_runs_taught(plan, tiny_model, alpaca_file):
    measure(plan, plan.memory.peak_bytes + 50_000)
    again = build(str(tiny_model), alpaca_file, {"gpu": "cpu", "budget": "1GiB", "rank": 4})
    assert again.memory.correction > 1
    assert again.memory.peak_bytes == pytest.approx(plan.memory.peak_bytes + 50_000, abs=5)
    assert any("Predictions for Llama models on this CPU are corrected by +" in note for note in again.notes)
    (time,) = (choice for choice in again.choices if choice.what == "time")
    assert (time.value, time.why) == ("about 30 s", "as fast as a run of this model here")
    assert again.seconds == pytest.approx(20, abs=15)


def test_a_plan_says_when_runs_confirm_its_predictions(plan, tiny_model, alpaca_file):
    measure(plan, plan.memory.peak_bytes)
    again = build(str(tiny_model), alpaca_file, {"gpu": "cpu", "budget": "1GiB", "rank": 4})
    assert again.memory.phases == plan.memory.phases
    assert any("on this CPU need no correction, after a measured run" in note for note in again.notes)
