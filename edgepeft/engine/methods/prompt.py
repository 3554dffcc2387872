"""The tensor of prompt tuning, [tokens, hidden] in float32; config and paper are in edgepeft.methods.prompt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgepeft.data.tokens import Tokenizer
from edgepeft.engine.kernels import has_values
from edgepeft.engine.methods.adapter import AttachedAdapter, Parts, check_tensors
from edgepeft.engine.methods.prefix import FILE_KEY, tokens_of
from edgepeft.engine.methods.seeds import generator_of
from edgepeft.engine.model.load import LoadedModel
from edgepeft.engine.model.prompt import PromptSite
from edgepeft.errors import BadInput, UsageError
from edgepeft.library.store import CONFIG_FILE, WEIGHTS_FILE
from edgepeft.methods import count_parameters
from edgepeft.methods.prompt import PromptConfig

_DEVIATION = 0.02
"""Of random rows, as models draw their embeddings."""


class PromptUpdate:
    """The rows."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = nn.Parameter(rows)

    def named_tensors(self) -> dict[str, nn.Parameter]:
        """One."""
        return {"rows": self.rows}

    def tensors(self) -> tuple[Tensor, ...]:
        """One."""
        return (self.rows,)


def build(loaded: LoadedModel, config: PromptConfig, seed: int) -> Parts:
    """See `EngineMethod`.

    Raises:
        UsageError: the context has no place for the rows, or the text has no token.
    """
    count_parameters(config, loaded.shape)
    generator = generator_of(seed, "prompt")
    if config.start == "random":
        rows = torch.randn(config.tokens, loaded.shape.hidden, generator=generator) * _DEVIATION
        return _parts(rows.to(loaded.device))
    if config.start == "text" and has_values():
        ids = _cycled(_encoded(loaded, config.text), config.tokens)
    else:
        ids = torch.randint(0, loaded.shape.vocab, (config.tokens,), generator=generator)
    with torch.no_grad():
        embed: Any = loaded.model.get_input_embeddings()
        rows = embed(ids.to(loaded.device)).to(torch.float32, copy=True)
    return _parts(rows)


def _encoded(loaded: LoadedModel, text: str) -> list[int]:
    ids = Tokenizer.load(Path(loaded.entry.folder)).encode(text)
    if not ids or max(ids) >= loaded.shape.vocab:
        raise UsageError(
            "the model has no tokens for this text", where="text", hint="Tell the task in a sentence of plain words"
        )
    return ids


def _cycled(ids: list[int], count: int) -> Tensor:
    return torch.tensor((ids * -(-count // len(ids)))[:count])


def _parts(rows: Tensor) -> Parts:
    update = PromptUpdate(rows)
    return Parts({PromptSite.name: update}, written=lambda: {FILE_KEY: update.rows.detach()})


def settings_of(adapter: AttachedAdapter) -> dict[str, Any]:
    """See `EngineMethod`."""
    update: Any = adapter.updates[PromptSite.name]
    tokens, hidden = update.rows.shape
    return {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": tokens,
        "token_dim": hidden,
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
    }


def restore(
    loaded: LoadedModel, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> tuple[PromptConfig, Parts]:
    """See `EngineMethod`."""
    where = str(folder / CONFIG_FILE)
    tokens = tokens_of(settings, where)
    try:
        config = PromptConfig(tokens)
        count_parameters(config, loaded.shape)
    except UsageError as error:
        raise BadInput(error.what, where=where, hint="It belongs to another base, or is damaged") from error
    expected = (tokens, loaded.shape.hidden)
    check_tensors(tensors, {FILE_KEY: expected}, where=str(folder / WEIGHTS_FILE))
    return config, _parts(tensors[FILE_KEY].to(loaded.device, torch.float32, copy=True))
