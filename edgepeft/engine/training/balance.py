"""The load-balancing loss of a mixture of experts, where the model's config asks for it.

Fedus et al. 2021, *Switch Transformers* (arXiv 2101.03961), equations 4 to 6: experts × Σ over experts of the share of
tokens that chose one times the mean probability that it was given. Routers are frozen here, but adapters change what
routers see, so the loss has a gradient.

transformers takes it over all tokens of a batch. It is no sum over tokens, so that would depend on which samples are
packed together; here it is taken for each sample by itself and weighted by the sample's tokens. A step's result then
does not depend on the layout, and a step of one sample has transformers' own value.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Balance(NamedTuple):
    """How a model balances its experts."""

    coefficient: float
    """Its part in the objective."""
    experts: int
    chosen: int
    """Experts that a token goes to."""
    function: Callable[..., Tensor]
    """transformers' own, of the model's family."""

    def summed(self, router_logits: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
        """The sum over samples of tokens × loss, a float32 scalar without the coefficient.

        Divide by the tokens of the whole optimizer step, not of the micro-batch.

        Args:
            router_logits: of each layer, [tokens, experts] of the packed row; those behind the samples do not count.
            lengths: tokens of each sample, in order.
        """
        rows = sum(lengths)
        layers = [layer.reshape(-1, layer.shape[-1])[:rows].split(list(lengths)) for layer in router_logits]
        total = torch.zeros((), dtype=torch.float32, device=router_logits[0].device)
        for number, length in enumerate(lengths):
            own = tuple(layer[number] for layer in layers)
            total = total + length * self.function(own, self.experts, self.chosen)
        return total


def balance_of(model: nn.Module) -> Balance | None:
    """How a transformers causal LM balances its experts; None where it has none, or its config does not ask for it."""
    config: Any = model.config
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    coefficient = float(getattr(model, "router_aux_loss_coef", None) or 0.0)
    if not getattr(config, "output_router_logits", False) or coefficient <= 0:
        return None
    families = (sys.modules[kind.__module__] for kind in type(model).__mro__)
    function = next((vars(family).get("load_balancing_loss_func") for family in families), None)
    known: Any = model
    return None if function is None else Balance(coefficient, known.num_experts, known.num_experts_per_tok, function)
