"""The adapter library: versions, bases, broken folders, names."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import msgspec
import pytest

from adapter_files import make_card, write_peft_folder
from edgepeft.errors import BadInput, UsageError
from edgepeft.library import store
from edgepeft.library.audit import read_audit
from edgepeft.library.store import (
    check_base,
    import_adapter,
    list_adapters,
    next_version,
    open_adapter,
    publish,
    removable,
    remove,
    resolve_adapter,
    scan_library,
)
from edgepeft.models.store import ModelEntry, add_model


@pytest.fixture
def entry(tiny_model: Path) -> ModelEntry:
    return add_model(tiny_model, "tiny")


@pytest.fixture
def folder(entry: ModelEntry, tmp_path: Path) -> Path:
    return write_peft_folder(tmp_path / "made", entry.shape)


def test_versions_count_up_and_the_newest_is_meant(folder: Path, edgepeft_home: Path) -> None:
    assert publish(folder, "triage", make_card()) == "triage@v1"
    assert publish(folder, "triage", make_card(run="triage-2")) == "triage@v2"
    newest = resolve_adapter("triage")
    assert (newest.reference, newest.path) == ("triage@v2", edgepeft_home / "adapters" / "triage" / "v2")
    assert newest.card is not None
    assert (newest.card.name, newest.card.version, newest.card.run) == ("triage", 2, "triage-2")
    assert resolve_adapter("triage@v1").version == 1
    assert resolve_adapter("triage@1").version == 1
    assert resolve_adapter(str(newest.path)).reference == "triage@v2"
    assert (folder / "adapter_model.safetensors").exists()
    assert [adapter.reference for adapter in list_adapters()] == ["triage@v1", "triage@v2"]
    assert next_version("triage") == 3
    assert {path.name for path in (edgepeft_home / "adapters" / "triage").iterdir()} == {"v1", "v2", "audit.jsonl"}


def test_tenth_version_is_newer_than_the_ninth(folder: Path) -> None:
    for _ in range(10):
        publish(folder, "triage", make_card())
    assert resolve_adapter("triage").version == 10


def test_another_base_is_refused_and_leaves_nothing(folder: Path, edgepeft_home: Path) -> None:
    publish(folder, "triage", make_card())
    with pytest.raises(BadInput, match="another base"):
        publish(folder, "triage", make_card(base_fingerprint="sha256:" + "b" * 64))
    assert {path.name for path in (edgepeft_home / "adapters" / "triage").iterdir()} == {"v1", "audit.jsonl"}


def test_removed_numbers_are_not_used_again_and_the_base_is_free(folder: Path) -> None:
    publish(folder, "triage", make_card())
    publish(folder, "triage", make_card())
    assert removable("triage") == ("triage", None, ["triage@v1", "triage@v2"])
    assert remove("triage", 2) == ["triage@v2"]
    assert resolve_adapter("triage").version == 1
    assert remove("triage") == ["triage@v1"]
    with pytest.raises(BadInput, match="triage"):
        resolve_adapter("triage")
    assert publish(folder, "triage", make_card(base_fingerprint="sha256:other")) == "triage@v3"
    assert [(line.action, line.version) for line in read_audit("triage")] == [
        ("published", 1),
        ("published", 2),
        ("removed", 2),
        ("removed", 1),
        ("published", 3),
    ]


@pytest.mark.parametrize("name", ["../x", "..", "", "A", "a/b", "a" * 65, "-a", ".hidden"])
def test_bad_names_are_refused(folder: Path, name: str, edgepeft_home: Path) -> None:
    with pytest.raises(UsageError):
        publish(folder, name, make_card())
    with pytest.raises(UsageError):
        import_adapter(folder, name)
    with pytest.raises(BadInput):
        removable(name)
    assert not (edgepeft_home / "adapters").exists()


@pytest.mark.parametrize("reference", ["../x", "nope", "nope@v3", "x@", "@v1", "a@vb"])
def test_unknown_references_say_what_there_is(
    folder: Path, reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    publish(folder, "triage", make_card())
    with pytest.raises(BadInput, match="triage"):
        resolve_adapter(reference)


def test_missing_version_names_those_there_are(folder: Path) -> None:
    publish(folder, "triage", make_card())
    with pytest.raises(BadInput, match=r"no v7.*v1"):
        resolve_adapter("triage@v7")


def test_broken_folders_say_why(folder: Path) -> None:
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    whole, text = weights.read_bytes(), config.read_text()

    def why() -> str:
        with pytest.raises(BadInput) as caught:
            open_adapter(folder)
        return str(caught.value)

    weights.write_bytes(whole[: len(whole) // 2])
    assert "cut short" in why()
    weights.write_bytes(b"not safetensors at all")
    assert "safetensors" in why()
    weights.unlink()
    assert "no adapter_model.safetensors" in why()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04")
    assert "pickled" in why()
    weights.write_bytes(whole)
    for bad in ("{", "[]", '{"r": 4}', '{"peft_type": 3}'):
        config.write_text(bad)
        assert "adapter_config.json" in why()
    config.write_bytes(b"\xff\xff")
    assert "adapter_config.json" in why()
    config.unlink()
    assert "no adapter_config.json" in why()
    config.write_text(text)
    (folder / "card.json").write_text('{"name": "x"}')
    assert "card.json" in why()
    (folder / "card.json").unlink()
    assert open_adapter(folder).card is None


def test_a_broken_version_does_not_hide_the_others(folder: Path, edgepeft_home: Path) -> None:
    publish(folder, "triage", make_card())
    publish(folder, "triage", make_card())
    (edgepeft_home / "adapters" / "triage" / "v2" / "adapter_config.json").unlink()
    usable, broken = scan_library()
    assert [adapter.reference for adapter in usable] == ["triage@v1"]
    assert [version.path.name for version in broken] == ["v2"]
    assert next_version("triage") == 3


def test_fingerprint_decides_about_the_base(folder: Path, entry: ModelEntry) -> None:
    publish(folder, "fits", make_card(base_fingerprint=entry.fingerprint))
    assert check_base(resolve_adapter("fits"), entry) == []
    publish(folder, "other", make_card(base="big-model"))
    with pytest.raises(BadInput, match="was trained on big-model"):
        check_base(resolve_adapter("other"), entry)


def test_without_a_card_the_shape_decides_and_warns(folder: Path, entry: ModelEntry, tmp_path: Path) -> None:
    (warning,) = check_base(open_adapter(folder), entry)
    assert "unverified" in warning
    shape = entry.shape
    wider = tuple(
        msgspec.structs.replace(linear, in_features=linear.in_features * 2)
        if linear.name == "mlp.down_proj"
        else linear
        for linear in shape.linears
    )
    others = {
        "wide": (msgspec.structs.replace(shape, linears=wider), {}, "mlp.down_proj of layer 0"),
        "deep": (msgspec.structs.replace(shape, layers=3), {}, "layer 2"),
        "shallow": (msgspec.structs.replace(shape, layers=1), {}, "in 1 layers"),
    }
    for name, (other, config, expected) in others.items():
        with pytest.raises(BadInput, match=expected):
            check_base(open_adapter(write_peft_folder(tmp_path / name, other, **config)), entry)
    partly = write_peft_folder(tmp_path / "partly", msgspec.structs.replace(shape, layers=1), layers_to_transform=[0])
    assert len(check_base(open_adapter(partly), entry)) == 1


def test_import_takes_peft_folders_and_keeps_cards(folder: Path, entry: ModelEntry, tmp_path: Path) -> None:
    assert import_adapter(folder, "taken") == "taken@v1"
    taken = resolve_adapter("taken")
    assert taken.card is None
    assert taken.weights.read_bytes() == (folder / "adapter_model.safetensors").read_bytes()
    publish(folder, "mine", make_card())
    assert import_adapter(resolve_adapter("mine").path, "yours") == "yours@v1"
    card = resolve_adapter("yours").card
    assert card is not None
    assert (card.name, card.version) == ("yours", 1)
    deep = write_peft_folder(tmp_path / "deep", msgspec.structs.replace(entry.shape, layers=3))
    with pytest.raises(BadInput, match="another base"):
        import_adapter(deep, "taken")


def test_publishing_at_once_gives_every_version_its_own_number(folder: Path) -> None:
    made: list[str] = []
    threads = [threading.Thread(target=lambda: made.append(publish(folder, "triage", make_card()))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [f"triage@v{number}" for number in range(1, 7)]
    for adapter in list_adapters():
        assert adapter.card is not None
        assert adapter.card.version == adapter.version


def test_a_failed_copy_leaves_nothing(folder: Path, edgepeft_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgepeft.errors import DiskProblem

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.shutil, "copyfile", full)
    with pytest.raises(DiskProblem, match="full"):
        publish(folder, "triage", make_card())
    assert not any((edgepeft_home / "adapters" / "triage").iterdir())
    assert list_adapters() == []


def test_undecodable_audit_lines_are_skipped(folder: Path, edgepeft_home: Path) -> None:
    publish(folder, "triage", make_card())
    with (edgepeft_home / "adapters" / "triage" / "audit.jsonl").open("ab") as file:
        file.write(b'{"half')
    publish(folder, "triage", make_card())
    assert next_version("triage") == 3
    assert json.loads((edgepeft_home / "adapters" / "triage" / "v2" / "card.json").read_text())["version"] == 2
