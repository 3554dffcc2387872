"""`edgepeft adapters` on a library made of plain files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapter_files import make_card, write_peft_folder
from edgepeft.cli.app import app
from edgepeft.errors import BadInput, UsageError
from edgepeft.library.store import publish
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
