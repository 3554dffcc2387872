"""Finding the models of other programs, and the `models` commands."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from edgepeft.cli.app import run
from edgepeft.errors import BadInput
from edgepeft.models.discovery import FoundModel, scan
from edgepeft.models.gguf_header import gguf_architecture
from edgepeft.models.store import add_model
from tiny import write_tiny_model


@pytest.fixture
def empty_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's home folder in which no program has left a model."""
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "OLLAMA_MODELS"):
        monkeypatch.delenv(name, raising=False)
    user = tmp_path / "user"
    user.mkdir()
    monkeypatch.setenv("HOME", str(user))
    monkeypatch.setenv("USERPROFILE", str(user))
    return user


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def write_gguf_header(path: Path, architecture: str) -> Path:
    """A GGUF without tensors, whose architecture stands behind pairs of other types."""
    pairs = [
        _text("general.alignment") + struct.pack("<II", 4, 32),
        _text("general.tags") + struct.pack("<IIQ", 9, 8, 2) + _text("chat") + _text("small"),
        _text("some.numbers") + struct.pack("<IIQ3f", 9, 6, 3, 1.0, 2.0, 3.0),
        _text("general.name") + struct.pack("<I", 8) + _text("A model"),
        _text("general.architecture") + struct.pack("<I", 8) + _text(architecture),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(pairs))
    return path


def _by_name(found: list[FoundModel]) -> dict[str, FoundModel]:
    return {model.name: model for model in found}


def test_the_architecture_is_read_from_the_header(tmp_path: Path) -> None:
    path = write_gguf_header(tmp_path / "m.gguf", "qwen3")
    assert gguf_architecture(path) == "qwen3"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(BadInput, match="not a complete GGUF"):
        gguf_architecture(path)


def test_each_program_is_searched(empty_user: Path) -> None:
    assert scan() == []
    repository = empty_user / ".cache" / "huggingface" / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / "abc"
    original = write_tiny_model(repository / "blobs")
    snapshot.mkdir(parents=True)
    for path in original.iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    (repository.parent / "models--org--pickled" / "snapshots" / "1").mkdir(parents=True)
    pickled = repository.parent / "models--org--pickled" / "snapshots" / "1"
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"pickle")
    write_gguf_header(empty_user / ".lmstudio" / "models" / "maker" / "Coder-GGUF" / "coder-Q4_K_M.gguf", "qwen2")
    write_gguf_header(empty_user / ".lmstudio" / "models" / "maker" / "Coder-GGUF" / "mmproj-f16.gguf", "clip")
    write_gguf_header(empty_user / ".ollama" / "models" / "blobs" / "sha256-77", "mamba")
    layers = [
        {"mediaType": "application/vnd.ollama.image.license", "digest": "sha256:00"},
        {"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:77"},
    ]
    manifest = empty_user / ".ollama" / "models" / "manifests" / "registry" / "library" / "snake" / "7b"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"layers": layers}))
    (manifest.parent / "broken").write_text("{")

    found = _by_name(scan())
    assert set(found) == {"org/tiny", "org/pickled", "maker/Coder-GGUF/coder-Q4_K_M.gguf", "snake:7b"}
    tiny = found["org/tiny"]
    assert (tiny.origin, tiny.kind, tiny.usable, tiny.in_store) == ("huggingface", "safetensors", True, None)
    assert tiny.size_bytes == (original / "model.safetensors").stat().st_size
    assert "pickle" in found["org/pickled"].reason
    assert found["maker/Coder-GGUF/coder-Q4_K_M.gguf"].usable
    assert "'mamba' cannot be converted" in found["snake:7b"].reason

    add_model(tiny.path, name="tiny")
    assert _by_name(scan())["org/tiny"].in_store == "tiny"


def test_named_folders_are_searched_below_and_the_store_is_not(empty_user: Path, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "disk" / "llms" / "one")
    add_model(tmp_path / "disk" / "llms" / "one", copy=True, name="copied")
    shutil.copytree(os.environ["EDGEPEFT_HOME"], tmp_path / "disk" / "elsewhere", dirs_exist_ok=True)
    found = _by_name(scan([tmp_path / "disk", Path(os.environ["EDGEPEFT_HOME"])]))
    assert set(found) == {"llms/one", "elsewhere/models/copied"}
    with pytest.raises(BadInput, match="no such folder"):
        scan([tmp_path / "nowhere"])


def _command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        run(["models", *arguments])
    printed = capsys.readouterr()
    return int(caught.value.code or 0), printed.out, printed.err


def test_the_commands(empty_user: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No model is in the store yet." in _command(capsys, "list")[1]
    code, text, _ = _command(capsys, "add", str(tiny_model), "--name", "mine")
    assert (code, text) == (0, "mine is ready: 90.7 k parameters, fp32, 356 KiB\n")
    code, text, _ = _command(capsys, "show", "mine")
    assert code == 0
    assert "ChatML" in text
    assert "nf4" in text
    assert str(tiny_model) in text
    code, text, _ = _command(capsys, "show", "mine", "--json")
    shown = json.loads(text)
    assert shown["parameters"] == 90_688
    assert shown["size_by_precision"]["bf16"] == 2 * 90_688
    assert [entry["name"] for entry in json.loads(_command(capsys, "list", "--json")[1])] == ["mine"]
    code, text, _ = _command(capsys, "scan", str(tiny_model.parent), "--json")
    assert [model["in_store"] for model in json.loads(text)] == ["mine"]
    code, text, _ = _command(capsys, "remove", "mine", "--json")
    assert len(json.loads(text)["done"]) == 2
    code, text, error = _command(capsys, "show", "mine")
    assert (code, text, len(error.splitlines())) == (3, "", 1)


def test_show_needs_no_torch(tiny_model: Path) -> None:
    add_model(tiny_model, name="mine")
    script = (
        "import sys\nfrom edgepeft.cli.app import run\n"
        "try:\n    run(['models', 'show', 'mine'])\n"
        "except SystemExit as done:\n    assert done.code == 0, done.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'tokenizers', 'gguf'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60)
