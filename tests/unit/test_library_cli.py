"""`edgepeft adapters` on a library made of plain files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapter_files import make_card, write_peft_folder
from edgepeft.cli.app import app
from edgepeft.errors import BadInput, UsageError
from edgepeft.library.store import publish, resolve_adapter
from edgepeft.models.store import ModelEntry, add_model


@pytest.fixture
def entry(tiny_model: Path) -> ModelEntry:
    return add_model(tiny_model, "tiny")


@pytest.fixture
def folder(entry: ModelEntry, tmp_path: Path) -> Path:
    return write_peft_folder(tmp_path / "made", entry.shape)


def told(*arguments: str) -> str:
    """What `edgepeft adapters ARGUMENTS` prints; its error is raised."""
    result = CliRunner().invoke(app, ["adapters", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_list_show_and_remove(folder: Path, edgepeft_home: Path) -> None:
    assert json.loads(told("list", "--json")) == {"adapters": [], "broken": []}
    publish(folder, "triage", make_card())
    publish(folder, "triage", make_card())
    (edgepeft_home / "adapters" / "triage" / "v1" / "adapter_config.json").unlink()
    listed = json.loads(told("list", "--json"))
    assert [adapter["reference"] for adapter in listed["adapters"]] == ["triage@v2"]
    assert "adapter_config.json" in listed["broken"][0]["why"]
    shown = told("show", "triage")
    assert "mlp.down_proj.lora_A.weight" in shown
    assert "0–1" in shown
    every = json.loads(told("show", "triage", "--json"))
    assert len(every["tensors"]) == 2 * 7 * 2
    assert every["card"]["run"] == "triage-1"
    assert [line["action"] for line in every["audit"]] == ["published", "published"]
    with pytest.raises(UsageError, match="--yes"):
        told("remove", "triage")
    assert json.loads(told("remove", "triage@v2", "--yes", "--json")) == {"removed": ["triage@v2"]}
    assert json.loads(told("remove", "triage", "-y", "--json")) == {"removed": ["triage@v1"]}
    with pytest.raises(BadInput, match="triage"):
        told("remove", "triage", "--yes")


def test_import_checks_the_base_when_it_is_named(folder: Path, entry: ModelEntry, tmp_path: Path) -> None:
    taken = json.loads(told("import", str(folder), "--name", "taken", "--base", "tiny", "--json"))
    assert taken["reference"] == "taken@v1"
    assert "unverified" in taken["warnings"][0]
    wrong = publish(folder, "wrong", make_card(base="big"))
    with pytest.raises(BadInput, match="big"):
        told("import", json.loads(told("show", wrong, "--json"))["path"], "--name", "copy", "--base", "tiny")
    assert {adapter["name"] for adapter in json.loads(told("list", "--json"))["adapters"]} == {"taken", "wrong"}


def test_rollback_publishes_the_older_version_again(folder: Path, edgepeft_home: Path) -> None:
    for run in ("triage-1", "triage-2", "triage-3"):
        publish(folder, "triage", make_card(run=run))
    library = edgepeft_home / "adapters" / "triage"
    before = {path: path.read_bytes() for path in library.rglob("*") if path.is_file() and path.name != "audit.jsonl"}
    back = json.loads(told("rollback", "triage", "v1", "--json"))
    assert (back["reference"], back["rolled_back_to"]) == ("triage@v4", "triage@v1")
    card = resolve_adapter("triage").card
    assert card is not None
    assert (card.name, card.version, card.run) == ("triage", 4, "triage-1")
    # Without a version: the one before the newest.
    assert "triage@v5 is a copy of v3" in told("rollback", "triage")
    assert "triage@v6 is a copy of v2" in told("rollback", "triage@v2")
    assert {path: path.read_bytes() for path in before} == before
    audit = json.loads(told("show", "triage", "--json"))["audit"]
    assert [(line["action"], line["version"], line["detail"]) for line in audit[3:]] == [
        ("rolled back", 4, "to v1"),
        ("rolled back", 5, "to v3"),
        ("rolled back", 6, "to v2"),
    ]
    assert (library / "v6" / "adapter_model.safetensors").read_bytes() == before[
        library / "v2" / "adapter_model.safetensors"
    ]


def test_rollback_leaves_a_broken_newest_version_behind(folder: Path, edgepeft_home: Path) -> None:
    publish(folder, "triage", make_card(run="triage-1"))
    publish(folder, "triage", make_card(run="triage-2"))
    (edgepeft_home / "adapters" / "triage" / "v2" / "adapter_config.json").unlink()
    assert json.loads(told("rollback", "triage", "--json"))["reference"] == "triage@v3"
    assert resolve_adapter("triage").version == 3
    with pytest.raises(BadInput, match="adapter_config"):
        told("rollback", "triage", "2")
    assert not [path for path in (edgepeft_home / "adapters" / "triage").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        (["nope"], BadInput, "no adapter in the library is called 'nope'"),
        (["../triage"], BadInput, "no adapter in the library is called"),
        (["single"], BadInput, "'single' has v1 only"),
        (["triage", "v7"], BadInput, r"has no v7.*It has v1, v2"),
        (["triage", "v2"], BadInput, "v2 is the newest version of 'triage' already"),
        (["triage", "old"], UsageError, "'old' is no version"),
        (["triage", "v0"], UsageError, "'v0' is no version"),
        (["triage@v1", "v1"], UsageError, "two versions are named"),
    ],
)
def test_a_rollback_that_cannot_be_meant_changes_nothing(
    folder: Path, edgepeft_home: Path, arguments: list[str], kind: type[Exception], said: str
) -> None:
    publish(folder, "single", make_card())
    publish(folder, "triage", make_card())
    publish(folder, "triage", make_card())
    with pytest.raises(kind, match=said):
        told("rollback", *arguments)
    assert [adapter["reference"] for adapter in json.loads(told("list", "--json"))["adapters"]] == [
        "single@v1",
        "triage@v1",
        "triage@v2",
    ]
