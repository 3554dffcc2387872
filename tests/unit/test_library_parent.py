"""Which adapters can be continued, and what a plan takes over from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from adapter_files import make_card, write_peft_folder
from edgepeft.cli.app import app
from edgepeft.errors import BadInput, UsageError
from edgepeft.library.parent import find_parent, lineage, verified_folder
from edgepeft.library.store import import_adapter, publish, remove
from edgepeft.methods import LoraConfig
from edgepeft.models.store import ModelEntry, add_model
from edgepeft.plan.build import build
from edgepeft.plan.files import read_plan_toml, write_plan_toml
from edgepeft.plan.revise import revise
from edgepeft.runs.launch import needed_disk_bytes
from edgepeft.runs.layout import create_run

OPTIONS: dict[str, Any] = {"gpu": "cpu", "budget": "1GiB", "precision": "bf16"}


@pytest.fixture
def base(tiny_model: Path) -> ModelEntry:
    return add_model(tiny_model)


@pytest.fixture
def folder(tmp_path: Path, base: ModelEntry) -> Path:
    return write_peft_folder(tmp_path / "peft", base.shape, rank=6, lora_dropout=0.1, use_rslora=True)


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), str(path))


def test_a_plan_takes_over_the_method_and_records_the_parent(
    base: ModelEntry, folder: Path, alpaca_file: Path, tmp_path: Path
) -> None:
    import_adapter(folder, "first")
    plan = build(base.name, alpaca_file, {**OPTIONS, "from_": "first"})
    recipe = plan.spec.recipe
    assert recipe.method == find_parent("first", base).method
    assert (recipe.method.rank, recipe.method.alpha, recipe.method.dropout) == (6, 8.0, 0.1)
    assert recipe.method.rank_stabilised
    assert recipe.method.targets == ("all-linear",)
    assert recipe.parent is not None
    assert recipe.parent.adapter == "first@v1"
    shown = {choice.what: choice for choice in plan.choices}
    assert shown["rank"].why == "as first@v1 has it"
    assert shown["from"].value == "first@v1"
    assert any("unverified" in note for note in plan.notes)
    # Memory is that of the parent's rank and targets.
    typed = build(base.name, alpaca_file, {**OPTIONS, "rank": 6, "alpha": 8.0, "dropout": 0.1})
    assert plan.memory.peak_bytes == typed.memory.peak_bytes
    assert needed_disk_bytes(plan) > needed_disk_bytes(typed)
    write_plan_toml(plan, tmp_path / "p.toml")
    assert revise(read_plan_toml(tmp_path / "p.toml"), where="p.toml") == plan
    edited = (tmp_path / "p.toml").read_text().replace("rank = 6", "rank = 8")
    (tmp_path / "p.toml").write_text(edited)
    with pytest.raises(BadInput, match="must keep rank 6"):
        revise(read_plan_toml(tmp_path / "p.toml"), where="p.toml")


@pytest.mark.parametrize(
    ("name", "value", "agrees"),
    [
        ("rank", 8, False),
        ("rank", 6, True),
        ("alpha", 8.0, True),
        ("alpha", 9.0, False),
        ("dropout", 0.0, False),
        ("targets", "q_proj", False),
        ("targets", "all-linear", True),
        ("targets", "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", True),
    ],
)
def test_an_option_that_contradicts_is_refused(
    base: ModelEntry, folder: Path, name: str, value: Any, agrees: bool
) -> None:
    parent = find_parent(str(folder), base)
    if agrees:
        assert parent.take_over({name: value}, base.shape)["rank"] == 6
        return
    with pytest.raises(UsageError, match=rf"--{name}: .* has to keep it\. Leave --{name} out"):
        parent.take_over({name: value}, base.shape)


def test_targets_are_those_of_the_tensors(base: ModelEntry, folder: Path) -> None:
    rewrite(folder, lambda found: {name: value for name, value in found.items() if "q_proj" in name or "mlp" in name})
    assert find_parent(str(folder), base).method.targets == ("down_proj", "gate_proj", "q_proj", "up_proj")


def test_another_base_is_refused(base: ModelEntry, folder: Path) -> None:
    publish(folder, "other", make_card())
    with pytest.raises(BadInput, match="was trained on tiny"):
        find_parent("other", base)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_qalora": True}, "QALoRA"),
        ({"alpha_pattern": {"q_proj": 3}}, "different scales"),
        ({"r": 5}, "its config says 5"),
        ({"lora_alpha": "8"}, "must be numbers"),
        ({"bias": "all"}, "biases"),
    ],
)
def test_what_cannot_be_continued_says_why(base: ModelEntry, folder: Path, settings: Any, said: str) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(BadInput, match=said):
        find_parent(str(folder), base)


def cut_ranks(folder: Path, rank: int, part: str) -> None:
    def smaller(found: dict[str, Any]) -> dict[str, Any]:
        return {
            name: np.ascontiguousarray(value[:rank] if "lora_A" in name else value[:, :rank]) if part in name else value
            for name, value in found.items()
        }

    rewrite(folder, smaller)


def test_ranks_of_single_linears_are_kept(base: ModelEntry, folder: Path) -> None:
    cut_ranks(folder, 3, "q_proj")
    path = folder / "adapter_config.json"
    with pytest.raises(BadInput, match=r"ranks 3, 6 and its config says 6"):
        find_parent(str(folder), base)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": {"q_proj": 3}}))
    method = find_parent(str(folder), base).method
    assert isinstance(method, LoraConfig)
    assert (method.rank, method.ranks, method.targets) == (6, {"q_proj": 3}, ("all-linear",))
    check = {"self_attn.q_proj": 3, "mlp.down_proj": 6}
    assert {name: method.rank_of(name) for name in check} == check


def test_several_ranks_of_one_kind_of_linear_are_refused(base: ModelEntry, folder: Path) -> None:
    cut_ranks(folder, 3, "layers.0.self_attn.q_proj")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": {"layers.0.self_attn.q_proj": 3}}))
    with pytest.raises(BadInput, match=r"ranks 3, 6 .* only an adapter of one rank for each kind"):
        find_parent(str(folder), base)


def test_some_layers_only_are_refused(base: ModelEntry, folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layers_to_transform": [0]}))
    rewrite(folder, lambda found: {name: value for name, value in found.items() if "layers.0" in name})
    with pytest.raises(BadInput, match="1 of 2 layers"):
        find_parent(str(folder), base)


def test_a_run_has_its_own_copy_and_only_of_the_planned_values(
    base: ModelEntry, folder: Path, alpaca_file: Path
) -> None:
    import_adapter(folder, "first")
    plan = build(base.name, alpaca_file, {**OPTIONS, "from_": "first"})
    run = create_run(plan, "next")
    assert (run.start / "adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()
    remove("first")
    with pytest.raises(BadInput, match="first@v1"):
        create_run(plan, "next")
    outside = build(base.name, alpaca_file, {**OPTIONS, "from_": str(folder)})
    rewrite(folder, lambda found: {name: value + 1 for name, value in found.items()})
    with pytest.raises(BadInput, match="not those that the plan was made for"):
        create_run(outside, "next")
    assert outside.spec.recipe.parent is not None
    with pytest.raises(BadInput):
        verified_folder(outside.spec.recipe.parent)


def test_the_command_line_takes_it(base: ModelEntry, folder: Path, alpaca_file: Path, tmp_path: Path) -> None:
    arguments = ["plan", base.name, str(alpaca_file), "--from", str(folder), "--gpu", "cpu", "--budget", "1GiB"]
    done = CliRunner().invoke(app, [*arguments, "--precision", "bf16", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["spec"]["recipe"]["parent"]["adapter"] == str(folder)
    both = ["train", "--plan", str(tmp_path / "p.toml"), "--name", "n", "--from", str(folder)]
    assert "--plan and --from cannot be given together" in str(CliRunner().invoke(app, both).exception)
    refused = CliRunner().invoke(app, [*arguments, "--rank", "4"])
    assert isinstance(refused.exception, UsageError)


def test_the_digest_is_as_it_was_before_later_fields(base: ModelEntry, folder: Path, alpaca_file: Path) -> None:
    import hashlib

    recipe = build(base.name, alpaca_file, OPTIONS).spec.recipe
    content = msgspec.to_builtins(recipe)
    assert content.pop("parent") is None
    assert content.pop("unfreeze") is None
    assert content["optimizer"].pop("lora_plus_ratio") == 1.0
    assert content["method"].pop("dora") is False
    assert content["method"].pop("ranks") == {}
    assert recipe.digest() == "sha256:" + hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()
    continued = build(base.name, alpaca_file, {**OPTIONS, "from_": str(folder)}).spec.recipe
    moved = msgspec.structs.replace(continued, parent=msgspec.structs.replace(continued.parent, sha256="sha256:0"))
    assert len({recipe.digest(), continued.digest(), moved.digest()}) == 3


def test_the_lineage_is_followed_and_shown(base: ModelEntry, folder: Path) -> None:
    for parent in ("", "line@v1", "line@v2"):
        publish(folder, "line", make_card(base_fingerprint=base.fingerprint, parent=parent))
    card = make_card(parent="line@v3")
    assert lineage(card) == ["line@v3", "line@v2", "line@v1"]
    assert lineage(make_card()) == []
    assert lineage(make_card(parent="gone@v1")) == ["gone@v1"]
    shown = CliRunner().invoke(app, ["adapters", "show", "line@v3"])
    assert "line@v2 ← line@v1" in shown.output
    remove("line", 2)
    assert lineage(card) == ["line@v3", "line@v2"]
