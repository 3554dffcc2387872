"""A tokenizer.json as the metadata of a GGUF file.

Two kinds are known: byte-level BPE, whose way of splitting text llama.cpp knows by a name, and BPE made from a
sentencepiece model. llama.cpp merges the pair whose result has the best score; sentencepiece's BPE scores are the
ranks of its merges, so they are found again from the order of the merges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gguf import SpecialVocab, TokenType
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from edgepeft.engine.combine.gguf_layout import Pair
from edgepeft.errors import BadInput
from edgepeft.models.source_folder import read_json

_CANONICAL = ("llama-bpe", "qwen2", "tekken", "gpt-4o")
"""Names of splits that llama.cpp has had from the beginning, before others that mean the same."""
_SPACE = "▁"
_UNRANKED = -1e9


def vocabulary(folder: Path, rows: int, template: str | None) -> list[Pair]:
    """The tokenizer of a model folder, its special tokens and chat template.

    Args:
        folder: of the model.
        rows: of the embedding; tokens that the tokenizer does not have are filled up.
        template: the chat template.

    Raises:
        BadInput: the tokenizer is of a kind that is not known here.
    """
    tokenizer = read_json(folder / "tokenizer.json")
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE":
        raise _unknown(folder, f"it is a {model.get('type')} tokenizer")
    byte_level = not model.get("byte_fallback")
    tokens, types = _tokens(tokenizer, rows, byte_level)
    special = SpecialVocab(folder, load_merges=byte_level, n_vocab=rows)
    # The package would take the one in tokenizer_config.json before the file that transformers prefers.
    special.chat_template = template
    pairs: list[Pair] = [("tokenizer_model", "gpt2" if byte_level else "llama")]
    pairs.append(("tokenizer_pre", _split_name(tokenizer, folder) if byte_level else "default"))
    pairs.append(("token_list", tokens))
    if not byte_level:
        pairs.append(("token_scores", _scores(model, tokens)))
        pairs.append(("add_space_prefix", _adds_space(tokenizer)))
    pairs.append(("token_types", types))
    return pairs + list(_special_pairs(special))


def _special_pairs(special: SpecialVocab) -> Iterator[Pair]:
    if special.merges:
        yield "token_merges", special.merges
    for kind, token in special.special_token_ids.items():
        if kind != "cls":
            yield f"{kind}_token_id", token
    for kind, value in special.add_special_token.items():
        if kind in ("bos", "eos", "sep"):
            yield f"add_{kind}_token", value
    if special.chat_template:
        yield "chat_template", special.chat_template


def _tokens(tokenizer: Mapping[str, Any], rows: int, byte_level: bool) -> tuple[list[str], list[int]]:
    texts = {index: text for text, index in tokenizer["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in tokenizer.get("added_tokens") or []}
    tokens, types = [], []
    for index in range(rows):
        if index in added:
            text, special = added[index]["content"], added[index].get("special")
            # llama.cpp matches user-defined tokens in the text itself, where blanks are blanks.
            tokens.append(text if special or byte_level else text.replace(_SPACE, " "))
            types.append(TokenType.CONTROL if special else TokenType.USER_DEFINED)
        elif index not in texts:
            tokens.append(f"[PAD{index}]")
            types.append(TokenType.UNUSED)
        else:
            tokens.append(texts[index])
            types.append(_type(texts[index], byte_level))
    return tokens, [int(kind) for kind in types]


def _type(text: str, byte_level: bool) -> TokenType:
    is_byte = not byte_level and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return TokenType.BYTE if is_byte else TokenType.NORMAL


def _scores(model: Mapping[str, Any], tokens: list[str]) -> list[float]:
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model.get("merges") or []):
        ranks.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), rank)
    return [float(-ranks[text]) if text in ranks else _UNRANKED for text in tokens]


def _split_name(tokenizer: Mapping[str, Any], folder: Path) -> str:
    """llama.cpp's name for how the text is split before merging."""
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise _unknown(folder, f"it normalizes text by {normalizer}")
    splitter = tokenizer.get("pre_tokenizer") or {}
    steps: list[dict[str, Any]] = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    kinds = [step.get("type") for step in steps]
    if any(step.get("add_prefix_space") for step in steps):
        raise _unknown(folder, "it puts a blank before the text")
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        pattern = (steps[0].get("pattern") or {}).get("Regex")
        known: list[str] = [name for name, split in GGUF_PRE_TOKENIZER_SPLITS.items() if split == pattern]
        for name in (*_CANONICAL, *known):
            if name in known:
                return name
    elif kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    raise _unknown(folder, "it splits text in a way that llama.cpp has no known name for")


def _adds_space(tokenizer: Mapping[str, Any]) -> bool:
    """Whether text is given a blank at its beginning."""
    normalizer = tokenizer.get("normalizer") or {}
    steps = [*(normalizer.get("normalizers") or []), normalizer]
    metaspace = tokenizer.get("pre_tokenizer") or {}
    return any(step.get("type") == "Prepend" for step in steps) or (
        metaspace.get("type") == "Metaspace" and metaspace.get("prepend_scheme") in ("always", "first")
    )


def _unknown(folder: Path, why: str) -> BadInput:
    return BadInput(
        f"its tokenizer cannot be written into a GGUF file: {why}",
        where=str(folder / "tokenizer.json"),
        hint="Write safetensors instead, or add the base from its GGUF file, whose tokenizer is then taken over",
    )
