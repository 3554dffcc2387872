"""Makes the one tokenizer.json that the light side reads out of older tokenizer files."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from edgepeft.errors import BadInput


def convert_tokenizer(source: Path, folder: Path) -> list[str]:
    """Writes tokenizer.json and its settings into `folder` from the sentencepiece or vocabulary files in `source`.

    Raises:
        BadInput: the files are missing or of a kind without a fast equivalent.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError, ImportError, AttributeError) as error:
        raise _unusable(source) from error
    if not getattr(tokenizer, "is_fast", False):
        raise _unusable(source)
    tokenizer.save_pretrained(str(folder))
    if not (folder / "tokenizer.json").is_file():
        raise _unusable(source)
    return ["tokenizer.json was made from the model's older tokenizer files"]


def _unusable(source: Path) -> BadInput:
    return BadInput(
        "there is no tokenizer.json, and none could be made from the files that are here",
        where=str(source),
        hint="Add the tokenizer.json that belongs to the model to the folder",
    )
