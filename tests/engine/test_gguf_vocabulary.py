"""Tokenizers as GGUF metadata: known kinds are written, others are refused, and what is read back is compared."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from edgepeft.engine.combine.gguf_model import check_tokenizer
from edgepeft.engine.combine.gguf_vocabulary import vocabulary
from edgepeft.errors import BadInput
from edgepeft.models.source_folder import read_json
from tiny import write_split_tokenizer


def change_tokenizer(folder: Path, **changes: Any) -> None:
    content = read_json(folder / "tokenizer.json")
    (folder / "tokenizer.json").write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalizes text by Lowercase"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "no known name for"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "blank before the text"),
        ({"model": {"type": "Unigram"}}, "Unigram tokenizer"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_split_tokenizer(tmp_path)
    change_tokenizer(tmp_path, **changes)
    with pytest.raises(BadInput, match=message):
        vocabulary(tmp_path, 260, None)


@pytest.mark.parametrize(("name", "digits"), [("llama-bpe", r"\p{N}{1,3}"), ("qwen2", r"\p{N}|")])
def test_splits_are_known_by_their_expression(tmp_path: Path, name: str, digits: str) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    expression = GGUF_PRE_TOKENIZER_SPLITS[name]
    assert digits in expression
    write_split_tokenizer(tmp_path)
    steps = [
        {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]
    change_tokenizer(tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
    assert dict(vocabulary(tmp_path, 260, None))["tokenizer_pre"] == name


def test_a_tokenizer_that_comes_back_otherwise_is_refused(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        write_split_tokenizer(tmp_path / name)
    check_tokenizer(tmp_path / "one", tmp_path / "other")
    model = read_json(tmp_path / "other" / "tokenizer.json")["model"]
    change_tokenizer(tmp_path / "other", model=model | {"merges": []})
    with pytest.raises(BadInput, match="in another way than the base's"):
        check_tokenizer(tmp_path / "one", tmp_path / "other")


def write_sentencepiece_like(folder: Path) -> None:
    """BPE with byte fallback and a mark for blanks, as Llama 2's, with merges that overlap in many ways."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters, words = [*"abcdefgh", "▁"], ["ab", "▁a", "bc", "abc", "▁ab", "cd", "▁abc", "bcd"]
    vocab = {text: index for index, text in enumerate([*pieces, *letters, *words])}
    # As they are made of a sentencepiece model: of each piece, in its order, every cut into two others.
    merges = [(w[:n], w[n:]) for w in words for n in range(1, len(w)) if {w[:n], w[n:]} <= vocab.keys()]
    special = [
        {
            "id": n,
            "content": pieces[n],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for n in range(3)
    ]
    content = {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [list(merge) for merge in merges],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True})
    )


def merged_by_score(text: str, scores: dict[str, float]) -> list[str]:
    """llama.cpp's way: the neighbours whose union has the best score are merged first, from the left where equal."""
    parts = list(text)
    while True:
        unions = [(scores[a + b], -n) for n, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not unions:
            return parts
        place = -max(unions)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def test_sentencepiece_scores_are_found_from_the_merges(tmp_path: Path) -> None:
    write_sentencepiece_like(tmp_path)
    pairs = dict(vocabulary(tmp_path, 280, "{{ messages }}"))
    assert (pairs["tokenizer_model"], pairs["tokenizer_pre"]) == ("llama", "default")
    assert pairs["add_space_prefix"] is True
    assert pairs["add_bos_token"] is True
    assert pairs["token_types"][:4] == [3, 3, 3, 6]
    assert pairs["token_list"][276:] == ["[PAD276]", "[PAD277]", "[PAD278]", "[PAD279]"]
    assert pairs["token_types"][276:] == [5] * 4
    scores = {
        text: score for text, score in zip(pairs["token_list"], pairs["token_scores"], strict=True) if score > -1e9
    }
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("abcd", "ab abcd bcd", "a ab abc", "cdcd abab", "bcdbcd"):
        expected = tokenizer.encode(text, add_special_tokens=False).tokens
        assert merged_by_score("▁" + text.replace(" ", "▁"), scores) == expected
