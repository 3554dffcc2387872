"""A loaded base with the adapters read so far and the keys and values of the last conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from edgepeft.chat.protocol import AdapterUse
from edgepeft.engine.inference.residents import Residents
from edgepeft.engine.methods import set_active
from edgepeft.engine.model.frozen import DTYPES
from edgepeft.engine.model.load import LoadedModel
from edgepeft.engine.training.loss import Head, head_of, logits_of, summed_loss
from edgepeft.engine.training.own_head import OwnHead, find_own_head
from edgepeft.errors import BadInput, DoesNotFit
from edgepeft.units import format_bytes

AdapterKey = tuple[tuple[str, float], ...]


@dataclass
class KeptPrefix:
    """Keys and values of a conversation's tokens, for the turn after it."""

    adapters: AdapterKey
    """What was active when they were made: they mean nothing under other adapters."""
    ids: list[int] = field(default_factory=list)
    """The tokens that `cache` holds, in order."""
    cache: DynamicCache = field(default_factory=DynamicCache)


class Session:
    """One base in memory, answering one request at a time.

    Args:
        loaded: the base.
        budget_bytes: bound for the base, the adapters and the key-value cache together; None for no bound.
    """

    def __init__(self, loaded: LoadedModel, budget_bytes: int | None = None) -> None:
        self.loaded = loaded
        self.prefix: KeptPrefix | None = None
        self.live_bytes = sum(loaded.bytes_by_category().values())
        self._budget_bytes = budget_bytes
        free_bytes = None if budget_bytes is None else budget_bytes - self.live_bytes
        self._residents = Residents(loaded, free_bytes, self.cache_token_bytes)
        self.active: AdapterKey = ()
        self._head = self._head_in_force()
        self._own_head = self._find_own_head()
        if budget_bytes is not None and self.live_bytes + self.cache_token_bytes > budget_bytes:
            raise DoesNotFit(
                f"the base alone needs {format_bytes(self.live_bytes)}, the budget is {format_bytes(budget_bytes)}",
                hint="Use --precision nf4, a smaller model or a larger budget",
            )

    @property
    def cache_token_bytes(self) -> int:
        """Bytes of keys and values that one token of one conversation needs."""
        shape = self.loaded.shape
        return 2 * shape.layers * shape.kv_heads * shape.head_dim * DTYPES[self.loaded.compute_dtype].itemsize

    @property
    def context_length(self) -> int:
        """Places that the model's context has behind what active adapters put first."""
        return self.loaded.shape.context_length - self.loaded.leading_tokens

    @property
    def wants_rows_alike(self) -> bool:
        """Whether padding in front of a row would change it: a sliding window would pass what stands first sooner."""
        return self.loaded.leading_tokens > 0 and self.loaded.shape.sliding_window is not None

    def token_limit(self, rows: int = 1) -> int:
        """Longest sequence in tokens, prompt and answer together, for each of `rows` conversations."""
        limit, leading = self.context_length, self.loaded.leading_tokens
        if self._budget_bytes is None:
            return limit
        free_bytes = self._budget_bytes - self.live_bytes - self._residents.held_bytes
        return min(limit, free_bytes // (self.cache_token_bytes * rows) - leading)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [B, V] of hidden states after the final norm, [B, H], contiguous.

        The model's own forward hands its head a strided slice, for which matmul copies the head once for every row.
        """
        if self._own_head is not None:
            return self._own_head.logits(hidden[None])[0]
        head = self._head
        assert head is not None
        logits = logits_of(hidden, head)
        logits = logits if head.scale == 1.0 else logits * head.scale
        return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap

    def summed_loss(self, hidden: Tensor, rows: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
        """As `engine.training.loss.summed_loss`, with the head of this base."""
        if self._own_head is not None:
            return self._own_head.summed_loss(hidden, rows, targets, chunk_tokens)
        assert self._head is not None
        return summed_loss(hidden, rows, targets, self._head, chunk_tokens)

    @torch.no_grad()
    def _head_in_force(self) -> Head | None:
        """The head as the active adapters leave it, its matrix in the compute dtype."""
        loaded, weight = self.loaded, self.loaded.head_in_force
        if weight is None:
            return None
        return head_of(loaded.model, weight.to(DTYPES[loaded.compute_dtype]))._replace(added=loaded.added_to_head)

    @torch.inference_mode()
    def _find_own_head(self) -> OwnHead | None:
        """The model's own code from hidden states to logits; None where its head is what it is taken for.

        Raises:
            BadInput: its logits are not finite, or depend on more than a token's own hidden state.
        """
        own = find_own_head(self.loaded, self._head)
        if own is not None and not own.by_row:
            raise BadInput(
                f"the output head of {type(self.loaded.model).__name__} looks at more than one token, which chat and "
                "scoring cannot do",
                hint="It can be trained; use another base model to chat with",
            )
        return own

    def activate(self, uses: Sequence[AdapterUse]) -> None:
        """Makes exactly these adapters active; a folder is read once and again only when its files changed.

        Raises:
            BadInput: a folder is missing, or its tensors do not belong to this base.
            DoesNotFit: the adapters do not fit into the budget; those that were active before stay so.
        """
        scales: dict[str, float] = {}
        for use in uses:
            scales[use.folder] = scales.get(use.folder, 0.0) + use.scale
        # What is kept of a conversation means nothing under other adapters.
        wanted = list(self._residents.take(scales, self._forget_prefix).items())
        set_active(self.loaded, wanted)
        self._head = self._head_in_force()
        self.active = tuple(wanted)

    def _forget_prefix(self) -> None:
        self.prefix = None

    def take_prefix(self, ids: list[int]) -> KeptPrefix:
        """The kept keys and values that fit the beginning of `ids`, or empty ones; never all of `ids`.

        The session forgets them until `keep_prefix`, so that a failure in between leaves nothing half-written.
        """
        kept, self.prefix = self.prefix, None
        if kept is None or kept.adapters != self.active:
            return KeptPrefix(self.active)
        # The last token is always computed: its logits begin the answer.
        shared = shared_length(kept.ids, ids[:-1])
        if shared == 0:
            return KeptPrefix(self.active)
        if surplus := len(kept.ids) - shared:
            kept.cache.crop(-surplus)
            del kept.ids[shared:]
        return kept

    def keep_prefix(self, prefix: KeptPrefix) -> None:
        """Keeps the keys and values of a finished turn for the next one."""
        self.prefix = prefix


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return length
