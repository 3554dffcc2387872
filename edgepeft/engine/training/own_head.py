"""Output heads that are more than a matrix: the model's own code computes the logits, autograd their gradient.

Where its code goes from hidden states to logits token by token, it is run on trained rows alone, a chunk at a time, and
each chunk once more in backward, so that the logits of all rows never exist. Otherwise the whole model runs, one sample
at a time, and its logits are whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import MoeModelOutputWithPast

from edgepeft.engine.model.load import LoadedModel
from edgepeft.engine.training.loss import Head, agrees, check_finite, knows_head


def find_own_head(loaded: LoadedModel, head: Head | None) -> OwnHead | None:
    """The model's own code where its logits, on a few tokens, are not those of `head`; None where they are.

    Args:
        loaded: the base.
        head: what its head is taken for; None where it is no single matrix.

    Raises:
        BadInput: the model's logits are not finite.
    """
    model: Any = loaded.model
    ids = torch.arange(3, 7, device=loaded.device).unsqueeze(0) % loaded.shape.vocab
    hidden = loaded.decoder(input_ids=ids, use_cache=False).last_hidden_state
    logits = model(input_ids=ids, use_cache=False).logits
    check_finite(logits)
    if head is not None and knows_head(hidden[0], head, logits[0]):
        return None
    return OwnHead(model, loaded.decoder, ids, hidden, logits)


class OwnHead:
    """The way of one model from hidden states, or from tokens, to logits.

    Args:
        model: transformers' causal LM, frozen.
        decoder: its inner model.
        ids: int64 [1, tokens], at least four, on which its ways are compared.
        hidden: [1, tokens, hidden], what the decoder makes of them.
        logits: [1, tokens, vocabulary], what the model makes of them.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module, ids: Tensor, hidden: Tensor, logits: Tensor) -> None:
        self._model = model
        self._decoder = decoder
        # In another order: what depends on a row's neighbours or its position shows.
        rows = torch.tensor([2, 0, 3], device=ids.device)
        self.by_row = self._same(lambda: self.logits(hidden[:, rows]), logits[:, rows])
        """Whether logits can be made of single rows of hidden states."""
        kept = rows.sort().values
        self._keeps_rows = "logits_to_keep" in inspect.signature(model.forward).parameters and self._same(
            lambda: model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits, logits[:, kept]
        )

    @property
    def warning(self) -> str:
        """What a person should know, in a sentence."""
        how = (
            "its own code computes the logits of trained tokens"
            if self.by_row
            else "the whole model runs on one sample at a time, with logits of its own"
        )
        return (
            f"the output head of {type(self._model).__name__} is none that edgepeft knows, so {how}, which takes more "
            "time and memory than was planned"
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [1, rows, vocabulary] of hidden states [1, rows, hidden] after the final norm."""
        with _answering(self._decoder, hidden):
            found: Tensor = self._model(inputs_embeds=hidden, use_cache=False).logits
        return found

    def summed_loss(self, hidden: Tensor, rows: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
        """As `loss.summed_loss`, for a model whose head goes by rows; rows and targets are int64 [trained]."""
        picked = hidden[0].index_select(0, rows)
        return _in_chunks(
            lambda part, wanted: _summed(self.logits(part[None])[0], wanted), picked, targets, chunk_tokens
        )

    def run_whole(self, positions: Tensor, rows: Tensor, **options: Any) -> tuple[Tensor, Any]:
        """Logits [trained, vocabulary] of the whole model for one sample, and all of its output.

        Args:
            positions: int64 [1, tokens].
            rows: int64 [trained], whose logits are wanted.
            options: further ones of the model's forward: `input_ids` int64 [1, tokens], or `inputs_embeds`.
        """
        if self._keeps_rows:
            options["logits_to_keep"] = rows
        out = self._model(position_ids=positions, use_cache=False, **options)
        logits: Tensor = out.logits[0]
        return logits if self._keeps_rows else logits.index_select(0, rows), out

    def _same(self, run: Any, expected: Tensor) -> bool:
        try:
            found: Tensor = run()
        except Exception:  # noqa: BLE001 - code of any model: whatever it raises, this way is closed
            return False
        return found.shape == expected.shape and agrees(found, expected, exact=found.dtype == torch.float32)


def summed_cross_entropy(logits: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
    """The summed loss of logits [trained, vocabulary] that exist already, float32 copies of a chunk at a time."""
    return _in_chunks(_summed, logits, targets, chunk_tokens)


def _in_chunks(loss: Any, values: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float32, device=values.device)
    if not targets.shape[0]:
        # Nothing is learned; the graph stays whole.
        return total + values.sum() * 0
    for part, wanted in zip(values.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        if torch.is_grad_enabled():
            total = total + checkpoint(
                loss, part, wanted, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
            )
        else:
            total = total + loss(part, wanted)
    return total


def _summed(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="sum")


@contextmanager
def _answering(decoder: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Lets the decoder answer with given hidden states, whatever it is asked."""
    attributes = decoder.__dict__
    before = attributes.get("forward")
    attributes["forward"] = lambda *_, **__: MoeModelOutputWithPast(last_hidden_state=hidden)
    try:
        yield
    finally:
        if before is None:
            del attributes["forward"]
        else:
            attributes["forward"] = before
