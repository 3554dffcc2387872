"""Whether the model knows the tokens that a run trains on.

A token that was added to a vocabulary has an embedding that was never trained: its row is zero, or as good as the mean
of all rows and so the same as those of other added tokens (what transformers' `resize_token_embeddings` leaves). No
adapter beside the layers teaches such a token anything, so that the run would look sound and learn nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from edgepeft.data.token_table import TokenTable
from edgepeft.data.tokens import Tokenizer
from edgepeft.engine.model.load import LoadedModel
from edgepeft.errors import BadInput
from edgepeft.methods import method_of
from edgepeft.spec import Recipe

NEAR_MEAN = 5e-3
"""Distance from the mean of all rows, over the spread of rows, up to which a row was only initialised. With what
transformers adds it is 3e-5; rounding to 16 bit adds a few 1e-4, and so does the mean where other rows changed since.
Of tokens that training hardly met it is above 0.01."""
_BLOCK_ROWS = 256
_ENDS = ("amin", "amax")
_NAMED = 5
"""Tokens that a message names."""


def check_vocabulary(loaded: LoadedModel, table: TokenTable, recipe: Recipe) -> str:
    """Refuses tokens without an embedding, and added ones that were never trained where the method does not train them.

    Large vocabularies also have ordinary tokens that training never met. They are rare in any text, and a run is not
    worth less for them.

    Args:
        loaded: the base.
        table: what is trained on.
        recipe: of the run.

    Returns:
        What a person should know of ordinary ones, or of any where only the embedding is trained, in a clause; empty
        where there are none.

    Raises:
        BadInput: naming the tokens and what trains them.
    """
    own: Tensor = loaded.model.get_input_embeddings().weight
    found = table.tokens()
    if len(found) and (largest := int(found[-1])) >= len(own):
        raise BadInput(
            f"the data has token {largest}, {_named(_tokenizer(loaded), [largest])}, and the model has {len(own)} "
            "embeddings",
            where=recipe.data.path,
            hint="Use the tokenizer that belongs to the model's weights",
        )
    method = method_of(recipe.method)
    ranks = method.table_terms(recipe.method)
    if method.trains_tables(recipe.method) or (ranks.embedding_rank and ranks.head_rank):
        return ""
    ids = torch.from_numpy(found).to(own.device)
    untrained = ids[never_trained(own, ids)].tolist()
    if not untrained:
        return ""
    tokenizer = _tokenizer(loaded)
    if ranks.embedding_rank:
        # What is only read needs no more; what is to be written has a row of the head that nothing moves.
        return (
            f"the data uses tokens that were never trained, which the output head cannot tell apart: "
            f"{_named(tokenizer, untrained)}; with lm_head among the targets it learns to write them"
        )
    added = [token for token in untrained if token in tokenizer.added_ids]
    kind = "an added token" if len(added) == 1 else "added tokens"
    if added:
        raise BadInput(
            f"the data uses {kind} whose embedding was never trained: {_named(tokenizer, added)}",
            where=recipe.data.path,
            hint=f"Train {'it' if len(added) == 1 else 'them'} with --set targets=all-linear,embed_tokens,lm_head, or "
            "use --method full",
        )
    return f"the data uses tokens whose embedding was never trained: {_named(tokenizer, untrained)}"


@torch.no_grad()
def never_trained(table: Tensor, ids: Tensor) -> Tensor:
    """Which rows of an embedding were only initialised: bool [n].

    Args:
        table: [vocabulary, hidden].
        ids: int64 [n], whose rows are asked for.
    """
    width = table.shape[1]
    direction = torch.randn(width, generator=torch.Generator().manual_seed(0)).to(table.device)
    sums, keys = torch.zeros(2, width, dtype=torch.float64, device=table.device), []
    for block in table.split(_BLOCK_ROWS):
        rows = block.float()
        sums[0] += rows.sum(0)
        sums[1] += rows.square().sum(0)
        # Added up row by row in one order: equal rows have equal keys.
        keys.append((rows * direction).sum(1))
    mean, squared = sums / len(table)
    spread = (squared - mean.square()).clamp_min(0).sum().sqrt()
    _, group, sizes = torch.cat(keys).unique(return_inverse=True, return_counts=True)
    # The first and the last row of each key: whatever row is asked for, one of them is another one.
    every = torch.arange(len(table), device=table.device)
    first, last = (torch.zeros_like(sizes).scatter_reduce_(0, group, every, how, include_self=False) for how in _ENDS)
    found = torch.zeros(len(ids), dtype=torch.bool, device=table.device)
    for place in range(0, len(ids), _BLOCK_ROWS):
        part = ids[place : place + _BLOCK_ROWS]
        rows, of = table[part], group[part]
        near = (rows.double() - mean).norm(dim=1) <= NEAR_MEAN * spread
        twins = (rows == table[first[of]]).all(1) & (rows == table[last[of]]).all(1) & (sizes[of] > 1)
        found[place : place + _BLOCK_ROWS] = near | twins | (rows == 0).all(1)
    return found


def _tokenizer(loaded: LoadedModel) -> Tokenizer:
    return Tokenizer.load(Path(loaded.entry.folder))


def _named(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    names = [tokenizer.decode([token]) or f"number {token}" for token in ids[:_NAMED]]
    more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
    return ", ".join(repr(name) for name in names) + more
