"""A model folder with an older tokenizer gets its tokenizer.json from the convert worker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from edgepeft.errors import BadInput
from edgepeft.models.store import add_model
from edgepeft.paths import home


def _make_old(folder: Path) -> None:
    """Replaces tokenizer.json by the vocabulary and merges that GPT-2's kind of tokenizer came with."""
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocab | {"<|endoftext|>": len(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"unk_token": "<|endoftext|>"}))


def test_an_older_tokenizer_is_converted(tiny_model: Path) -> None:
    _make_old(tiny_model)
    entry = add_model(tiny_model)
    tokenizer = Tokenizer.from_file(str(Path(entry.folder) / "tokenizer.json"))
    ids = tokenizer.encode("Hello  world<|endoftext|>").ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == "Hello  world<|endoftext|>"
    assert ids[-1] == 256
    assert any("older tokenizer files" in note for note in entry.notes)
    assert not (tiny_model / "tokenizer.json").exists()
    assert add_model(tiny_model) == entry


def test_an_unusable_older_tokenizer_is_told(tiny_model: Path) -> None:
    _make_old(tiny_model)
    (tiny_model / "tokenizer_config.json").unlink()
    (tiny_model / "vocab.json").rename(tiny_model / "tokenizer.model")
    (tiny_model / "merges.txt").unlink()
    with pytest.raises(BadInput, match=r"no tokenizer\.json") as caught:
        add_model(tiny_model)
    assert "tokenizer.json that belongs" in caught.value.hint
    assert [path.name for path in home().models.iterdir() if path.suffix != ".lock"] == []
