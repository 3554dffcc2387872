"""LoRA: a low-rank update beside each frozen linear layer.

Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models* (arXiv 2106.09685). A linear layer `x Wᵀ` becomes
`x Wᵀ + s (x Aᵀ) Bᵀ` with A of shape [rank, in], B of shape [out, rank] and s = alpha / rank, or alpha / √rank with
rank-stabilised scaling (Kalajdzievski 2023, arXiv 2312.03732). B starts at zero, so training starts from the base.

With `dora` (Liu et al. 2024, *DoRA: Weight-Decomposed Low-Rank Adaptation*, arXiv 2402.09353) the sum W + s B A gives
only directions: each of its rows is brought to a trained length m, which starts as the length of W's row. The length
that is divided by counts as a constant in backward (section 4.3 there).

The embedding and the output head get an update where they are targeted by name, as in all-linear,embed_tokens,lm_head:
without it tokens that were added to a vocabulary stay as they are. An embedding's rows become E[ids] + s (Aᵀ)[ids] Bᵀ
with A of shape [rank, vocabulary], which starts at zero, and B of [hidden, rank]; nothing of it is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from edgepeft.errors import UsageError
from edgepeft.methods.targets import Table, matching, means, table_of
from edgepeft.methods.terms import FLOAT32, LinearTerms, Method, TableTerms, Trained
from edgepeft.models.shape import LinearShape, ModelShape

DORA_WORK = 1.12
"""Time of a step with DoRA, LoRA's being 1: its lengths go over every output once more. Measured on one core in bf16
with 1,024 tokens: medians of 1.03 to 1.20 for ranks 8 and 64 and hidden sizes 576 and 2,048; assumed for cards."""


class LoraConfig(msgspec.Struct, frozen=True, tag="lora", forbid_unknown_fields=True):
    """What decides a LoRA adapter."""

    rank: int = 16
    """Inner dimension r of the update; memory grows linearly with it, quality flattens early."""
    alpha: float = 32.0
    """The update is scaled by alpha / r."""
    targets: tuple[str, ...] = ("all-linear",)
    """Module names (or their endings) that get an update; `all-linear` stands for every linear of every layer,
    `embed_tokens` and `lm_head` for the embedding and the output head."""
    dropout: float = 0.0
    """Share of the update's input entries that are zeroed in training."""
    rank_stabilised: bool = False
    """Scale by alpha / √r instead of alpha / r."""
    dora: bool = False
    """Whether the length of each row of the weight is trained by itself (DoRA)."""
    ranks: dict[str, int] = {}
    """Ranks of single linears, by module names or their endings, as in q_proj:8,down_proj:32; each is scaled by alpha
    over its own rank."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"a LoRA rank of {self.rank} is not possible", where="rank", hint="Use 4 to 128")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"a dropout of {self.dropout} is not possible", where="dropout", hint="Use 0 to 0.5")
        if not math.isfinite(self.alpha) or self.alpha == 0:
            raise UsageError(f"an alpha of {self.alpha} is not possible", where="alpha", hint="Twice the rank is usual")
        if not self.targets:
            raise UsageError("no target module is named", where="targets", hint="Use all-linear for every linear layer")
        for name, rank in self.ranks.items():
            if rank < 1:
                raise UsageError(f"a rank of {rank} for {name} is not possible", where="ranks", hint="Use 4 to 128")
        if self.dora and any(table_of(target) is not None for target in self.targets):
            raise UsageError(
                "DoRA changes linears of layers alone, not the embedding or the output head",
                where="targets",
                hint="Leave embed_tokens and lm_head out, or use dora=false",
            )

    @property
    def scale(self) -> float:
        """The factor s of the update, where `rank` is its rank."""
        return self.scale_of(self.rank)

    def scale_of(self, rank: int) -> float:
        """The factor s of an update of some rank."""
        return self.alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def rank_of(self, module: str) -> int:
        """The rank of a linear, by its path; of several names that mean it the longest counts."""
        found = [name for name in self.ranks if means(name, module)]
        return self.ranks[max(found, key=len)] if found else self.rank

    def check_ranks(self, sizes: Mapping[str, int]) -> None:
        """Refuses ranks that the targeted linears cannot have.

        Args:
            sizes: the smaller dimension of each, by its path.

        Raises:
            UsageError: a rank exceeds a dimension, or one is given for a linear that is not targeted.
        """
        for name in self.ranks:
            if not any(means(name, module) for module in sizes):
                known = ", ".join(sorted({module.rsplit(".", 1)[-1] for module in sizes}))
                raise UsageError(f"{name!r} is no linear that is targeted", where="ranks", hint=f"Targeted: {known}")
        for module, size in sizes.items():
            rank = self.rank_of(module)
            if rank > size:
                own = any(means(name, module) for name in self.ranks)
                raise UsageError(
                    f"rank {rank} exceeds the smaller dimension {size} of {module}",
                    where="ranks" if own else "rank",
                    hint=f"Use at most {size}" if own else f"Use at most {min(sizes.values())}",
                )


class Lora(Method):
    """See the module."""

    paper = "arXiv 2106.09685"
    peft_type = "LORA"
    adds = "a low-rank product beside each linear layer"
    merges = ranked = True

    def targeted(self, config: LoraConfig, shape: ModelShape) -> tuple[LinearShape, ...]:
        """The linears of one decoder layer that get an update.

        Raises:
            UsageError: a target matches no linear, or the rank exceeds a targeted dimension.
        """
        chosen = matching([target for target in config.targets if table_of(target) is None], shape)
        sizes = {linear.name: min(linear.in_features, linear.out_features) for linear in chosen}
        config.check_ranks(sizes | dict.fromkeys(_tables(config).values(), min(shape.vocab, shape.hidden)))
        return chosen

    def relative_work(self, config: LoraConfig) -> float:
        """See `Method`."""
        return DORA_WORK if config.dora else 1.0

    def table_terms(self, config: LoraConfig) -> TableTerms:
        """Products beside those that are targeted."""
        ranks = {table: config.rank_of(path) for table, path in _tables(config).items()}
        head = ranks.get("head", 0)
        return TableTerms(ranks.get("embedding", 0), head, drops=bool(head) and config.dropout > 0)

    def trained(self, config: LoraConfig, shape: ModelShape) -> Trained:
        """A, of r · in entries, and B, of r · out, for each targeted linear, and for embedding and head where they are
        targeted; with DoRA a length for each row, too."""
        sizes: list[int] = []
        for linear in self.targeted(config, shape):
            rank = config.rank_of(linear.name)
            sizes += (rank * linear.in_features, rank * linear.out_features)
            sizes += [linear.out_features] if config.dora else []
        others: list[int] = []
        for path in _tables(config).values():
            others += (config.rank_of(path) * shape.vocab, config.rank_of(path) * shape.hidden)
        return Trained(tuple(sizes), tuple(others))

    def held_bytes(self, config: LoraConfig, shape: ModelShape) -> int:
        """With DoRA: the squared length of each row of W, and the length of each row of the sum."""
        if not config.dora:
            return 0
        return shape.layers * sum(2 * FLOAT32 * linear.out_features for linear in self.targeted(config, shape))

    def linear_terms(
        self, config: LoraConfig, linear: LinearShape, tokens: int, compute_bytes: int, *, training: bool
    ) -> LinearTerms:
        """x Aᵀ is kept; A, B and their fresh gradients exist in the compute dtype while they are multiplied."""
        if config.dora:
            return _dora_terms(config, linear, tokens, compute_bytes, dropping=training and config.dropout > 0)
        rank, c = config.rank_of(linear.name), compute_bytes
        a, b = rank * linear.in_features, rank * linear.out_features
        inner = c * tokens * rank
        # Where products run in float32, neither parameters nor gradients are copied.
        low, high = (0, FLOAT32) if c == FLOAT32 else (c, c + FLOAT32)
        mask = c * tokens * linear.in_features if training and config.dropout else 0
        # Forward: the mask and the masked input, of which the latter stays.
        forward = max(2 * mask - inner, mask + low * max(a, b))
        # Backward: g B; the mask and the part of the input's gradient; the masked input and the fresh gradients.
        backward = inner + max(low * b, 2 * mask + max(low * a, high * b, FLOAT32 * b + high * a))
        return LinearTerms(parameters=a + b, kept_bytes=inner, forward_bytes=forward, backward_bytes=backward)

    def shared_terms(
        self, config: LoraConfig, linears: Sequence[LinearShape], tokens: int, compute_bytes: int, *, training: bool
    ) -> LinearTerms | None:
        """All A are put above each other, and so are all fresh dA, while they are multiplied; not with dropout, and not
        with DoRA."""
        if config.dora or (training and config.dropout):
            return None
        c, ranks = compute_bytes, [config.rank_of(linear.name) for linear in linears]
        sizes_b = [rank * linear.out_features for rank, linear in zip(ranks, linears, strict=True)]
        a, b = sum(rank * linear.in_features for rank, linear in zip(ranks, linears, strict=True)), sum(sizes_b)
        inner = c * tokens * sum(ranks)
        low = 0 if c == FLOAT32 else c
        # Forward: all A in the compute dtype and stacked, before x Aᵀ is there; then each B.
        forward = max((low + c) * a - inner, c * a, low * max(sizes_b))
        # Backward: g B of one linear beside the place for all; A again; every dA and dB, the last dB as it was formed.
        fresh = (c + FLOAT32) * a + FLOAT32 * b + low * sizes_b[-1]
        product = max(low * size + c * tokens * rank for size, rank in zip(sizes_b, ranks, strict=True))
        return LinearTerms(
            parameters=a + b,
            kept_bytes=inner,
            forward_bytes=forward,
            backward_bytes=inner + max(product, (low + c) * a, fresh),
        )


def _tables(config: LoraConfig) -> dict[Table, str]:
    """The targeted ones of embedding and head, and what their paths end with."""
    found: dict[Table, str] = {}
    for target in config.targets:
        table = table_of(target)
        if table is not None:
            found[table] = target
    return found


def _dora_terms(
    config: LoraConfig, linear: LinearShape, tokens: int, compute_bytes: int, *, dropping: bool
) -> LinearTerms:
    """x Aᵀ and what the lengths multiply are kept. See engine.methods.dora, line by line."""
    rank, c = config.rank_of(linear.name), compute_bytes
    a, b, rows = rank * linear.in_features, rank * linear.out_features, FLOAT32 * linear.out_features
    inner, out = c * tokens * rank, c * tokens * linear.out_features
    low, high = (0, FLOAT32) if c == FLOAT32 else (c, c + FLOAT32)
    mask = c * tokens * linear.in_features if dropping else 0
    back = inner + 2 * mask + max(low * a, high * b, FLOAT32 * b + high * a)
    if dropping:
        # What the lengths let through to the frozen matrix, beside the part of the input's gradient.
        back = max(back, inner + 2 * mask + out)
    return LinearTerms(
        parameters=a + b + linear.out_features,
        kept_bytes=inner + out,
        forward_bytes=max(2 * mask - inner - out, mask + low * max(a, b)),
        backward_bytes=rows + max(out, (FLOAT32 + low) * b, (low or FLOAT32) * b + inner, back),
        rescales_output=not dropping,
        first_bytes=rows + max(low * a + c * b, high * b),
        first_forming_bytes=low * a,
        forming_forward_bytes=mask + low * b - out if dropping else None,
        forming_backward_bytes=rows + inner + mask + out if dropping else None,
    )
