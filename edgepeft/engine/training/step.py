"""Forward and backward of one optimizer step, and the loss on held-out samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from edgepeft.engine.heap import trim_heap
from edgepeft.engine.kernels import number
from edgepeft.engine.ledger import assign, counting_as
from edgepeft.engine.methods.dropout import dropout_context
from edgepeft.engine.model.load import LoadedModel
from edgepeft.engine.training.attention import packed, use_packed_attention
from edgepeft.engine.training.balance import balance_of
from edgepeft.engine.training.batches import MicroBatch, Sample, build_micro_batch, plan_micro_batches
from edgepeft.engine.training.checkpointing import set_checkpointing
from edgepeft.engine.training.loss import Head, head_of, summed_loss
from edgepeft.engine.training.memory import MemoryGauge, Size
from edgepeft.engine.training.own_head import OwnHead, find_own_head, summed_cross_entropy
from edgepeft.engine.training.recovery import first_line, is_out_of_memory, release_memory, smaller_layout
from edgepeft.errors import OutOfMemory, UsageError
from edgepeft.spec import Checkpointing, Layout, Recipe


class MicroBatchTooLarge(Exception):
    """Memory ran out in a micro-batch."""

    def __init__(self, tokens: int, samples: int, message: str) -> None:
        super().__init__(message)
        self.tokens = tokens
        self.samples = samples


class StepSums(NamedTuple):
    """What a step, or an evaluation, added up."""

    loss: float
    """Sum over the trained tokens; what balances experts is no part of it, so that it compares with evaluations."""
    trained_tokens: int
    tokens: int
    """Tokens that went through the model."""


class StepRunner:
    """Runs micro-batches of one loaded model.

    Args:
        loaded: the base, with the adapter active; it is switched to packed attention.
        recipe: seed and dropout are read from it.
        backward: what `loss.backward()` goes through; the place of a gradient scaler.
        gauge: told about every micro-batch that it wants to watch.
        before_micro_batch: called before each; it may raise to leave the step.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        recipe: Recipe,
        *,
        backward: Callable[[Tensor], None],
        gauge: MemoryGauge,
        before_micro_batch: Callable[[], None] = lambda: None,
    ) -> None:
        self._loaded = loaded
        self._recipe = recipe
        self._backward = backward
        self._gauge = gauge
        self._before_micro_batch = before_micro_batch
        weight = loaded.head_weight
        self._head = None if weight is None else head_of(loaded.model, weight)
        self._own_head: OwnHead | None = None
        self._balance = balance_of(loaded.model)
        self._checkpointing: Checkpointing = "none"
        set_checkpointing(loaded.layers, self._checkpointing)
        use_packed_attention(loaded.model)
        # What several updates share is one tensor.
        tensors = [x for site in loaded.sites().values() for update in site.adapters.values() for x in update.tensors()]
        self._trained = list({id(tensor): tensor for tensor in tensors}.values())
        for tensor in self._trained:
            tensor.register_post_accumulate_grad_hook(_name_gradient)

    @torch.no_grad()
    def check(self) -> str:
        """Compares our logits with the model's own on a few tokens; where they differ, its own code is used from here.

        Returns:
            What a person should know of that, in a sentence; empty where all is well.

        Raises:
            BadInput: the model's logits are not finite.
            UsageError: an adapter drops entries of what a head of the model's own code is given.
        """
        self._own_head = find_own_head(self._loaded, self._head_in_force())
        if self._own_head is not None and any(low.mask is not None for low in self._loaded.added_to_head):
            raise UsageError(
                f"dropout before the output head of {type(self._loaded.model).__name__}, which is none that edgepeft "
                "knows, is not possible",
                where="dropout",
                hint="Use --set dropout=0, or leave lm_head out of the targets",
            )
        return "" if self._own_head is None else self._own_head.warning

    def train(self, samples: Sequence[Sample], layout: Layout, step: int, *, watch_all: bool = False) -> StepSums:
        """Adds the gradient of the mean loss over all trained tokens of `samples` to the adapter's.

        Args:
            samples: of this optimizer step.
            layout: how they are packed and computed; the result does not depend on it.
            step: counted from 0; dropout depends on it.
            watch_all: measure memory in every micro-batch.

        Raises:
            MicroBatchTooLarge: memory ran out; gradients are incomplete.
        """
        if layout.checkpointing != self._checkpointing:
            set_checkpointing(self._loaded.layers, layout.checkpointing)
            self._checkpointing = layout.checkpointing
        trained = sum(len(sample.targets) for sample in samples)
        tokens_of_step = sum(len(sample.ids) for sample in samples)
        total = torch.zeros((), dtype=torch.float32, device=self._loaded.device)
        tokens = 0
        for group in self._groups(samples, layout):
            self._begin_micro_batch()
            size = _size(group, layout)._replace(
                gradients=any(tensor.grad is not None for tensor in self._trained),
                trained=sum(tensor.requires_grad for tensor in self._trained),
                samples=len(group) if self._loaded.prefix_tokens else 0,
            )
            watched: AbstractContextManager[object] = nullcontext()
            if watch_all or self._gauge.wants(size):
                watched = self._gauge.watch(size)
            try:
                batch = self._build(group)
                with watched, packed(batch.row_lengths), self._dropout(step, batch):
                    loss, unbalanced = self._loss(batch, layout.loss_chunk_tokens)
                    objective = loss / trained
                    if self._balance is not None and unbalanced is not None:
                        objective = objective + self._balance.coefficient * unbalanced / tokens_of_step
                    with counting_as("recomputed layer", "backward of the loss"):
                        self._backward(objective)
                    total += loss.detach()
            except (RuntimeError, MemoryError) as error:
                self._loaded.forget_unfinished()
                if not is_out_of_memory(error):
                    raise
                raise MicroBatchTooLarge(size.tokens, len(group), first_line(error)) from None
            tokens += size.tokens
        return StepSums(number(total), trained, tokens)

    @torch.no_grad()
    def evaluate(
        self,
        samples: Sequence[Sample],
        layout: Layout,
        *,
        on_smaller: Callable[[Layout, str, int, str], None] = lambda *told: None,
    ) -> StepSums:
        """The summed loss on `samples`; runs in a smaller layout of its own when memory runs out.

        Args:
            samples: held out.
            layout: of training, which stays as it is.
            on_smaller: told the smaller layout, what changed in words, the tokens that did not fit, and why.

        Raises:
            OutOfMemory: not even one sample fits.
        """
        left = list(samples)
        # Without a backward nothing is kept, so this rung of the ladder would not help.
        layout = msgspec.structs.replace(layout, checkpointing="layer")
        loss, tokens = 0.0, 0
        while left:
            group = self._groups(left, layout)[0]
            self._begin_micro_batch()
            size = _size(group, layout)
            part: float | None = None
            why = ""
            wanted = self._gauge.wants_evaluation(size)
            watched = self._gauge.watch(size, evaluation=True) if wanted else nullcontext()
            try:
                batch = self._build(group)
                with watched, packed(batch.row_lengths):
                    part = number(self._loss(batch, layout.loss_chunk_tokens)[0])
            except (RuntimeError, MemoryError) as error:
                self._loaded.forget_unfinished()
                if not is_out_of_memory(error):
                    raise
                why = first_line(error)
            if part is None:
                release_memory()
                smaller = smaller_layout(layout, size.tokens, len(group))
                if smaller is None:
                    raise OutOfMemory(
                        f"a held-out sample of {size.longest} tokens does not fit into memory",
                        hint="Give a separate held-out file with shorter samples, or a smaller --max-seq-len",
                    )
                layout = smaller[0]
                on_smaller(*smaller, size.tokens, why)
                continue
            loss += part
            tokens += size.tokens
            done = {sample.number for sample in group}
            left = [sample for sample in left if sample.number not in done]
        return StepSums(loss, sum(len(sample.targets) for sample in samples), tokens)

    def _begin_micro_batch(self) -> None:
        self._before_micro_batch()
        if self._loaded.device.type == "cpu":
            trim_heap()

    def _groups(self, samples: Sequence[Sample], layout: Layout) -> list[list[Sample]]:
        """The micro-batches; of one sample each where a head would see those that are packed beside it."""
        alone = self._own_head is not None and not self._own_head.by_row
        return plan_micro_batches(samples, 1 if alone else layout.micro_batch_tokens)

    def _build(self, group: Sequence[Sample]) -> MicroBatch:
        by_row = self._own_head is None or self._own_head.by_row
        loaded = self._loaded
        return build_micro_batch(group, loaded.device, fill_up=by_row, first_position=loaded.prefix_tokens)

    def _loss(self, batch: MicroBatch, chunk_tokens: int) -> tuple[Tensor, Tensor | None]:
        """The summed loss, and in training what balances experts; None where nothing does."""
        balance, own = self._balance if torch.is_grad_enabled() else None, self._own_head
        options: dict[str, Any] = {} if self._balance is None else {"output_router_logits": balance is not None}
        hidden = logits = None
        with counting_as("saved activations", "forward"):
            options |= self._inputs(batch)
            if own is not None and not own.by_row:
                logits, out = own.run_whole(batch.position_ids, batch.rows, **options)
            else:
                out = self._loaded.decoder(position_ids=batch.position_ids, use_cache=False, **options)
                hidden = out.last_hidden_state
            # Embeddings that were handed in are needed no more.
            options.clear()
            routers = () if balance is None else out.router_logits
            del out
        with counting_as("logits and loss", "loss"):
            unbalanced = None if balance is None else balance.summed(routers, batch.lengths)
            del routers
            if logits is not None:
                return summed_cross_entropy(logits, batch.targets, chunk_tokens), unbalanced
            assert hidden is not None
            if own is not None:
                return own.summed_loss(hidden, batch.rows, batch.targets, chunk_tokens), unbalanced
            head = self._head_in_force()
            assert head is not None
            return summed_loss(hidden, batch.rows, batch.targets, head, chunk_tokens), unbalanced

    def _head_in_force(self) -> Head | None:
        weight = self._loaded.head_in_force
        if weight is None or self._head is None:
            return None
        return self._head._replace(weight=weight, added=self._loaded.added_to_head)

    def _inputs(self, batch: MicroBatch) -> dict[str, Tensor]:
        """The row's ids, or its embeddings where trained ones stand before each sample."""
        prompt = self._loaded.prompt
        if not prompt.active:
            return {"input_ids": batch.input_ids}
        embed: Any = self._loaded.model.get_input_embeddings()
        return {"inputs_embeds": prompt.put_before(embed(batch.input_ids).detach(), batch.lengths)}

    def _dropout(self, step: int, batch: MicroBatch) -> AbstractContextManager[None]:
        return dropout_context(self._recipe.seed, step, batch.row_samples, batch.row_lengths)


def _size(group: Sequence[Sample], layout: Layout) -> Size:
    lengths = [len(sample.ids) for sample in group]
    rows = sum(len(sample.targets) for sample in group)
    return Size(sum(lengths), max(lengths), min(rows, layout.loss_chunk_tokens))


def _name_gradient(parameter: Tensor) -> None:
    # Born as a temporary of the backward, it stays until the optimizer has used it.
    if parameter.grad is not None:
        assign([parameter.grad], "gradients")
