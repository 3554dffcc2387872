"""Norm tuning: the gains of all norms are trained, everything else is frozen.

Zhao et al. 2024, *Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning* (arXiv 2312.11420). Each
RMSNorm's gain (and each LayerNorm's gain and bias) is replaced by a trained copy in float32, some 0.01 % of a model.
"""

from __future__ import annotations

from typing import Any

import msgspec

from edgepeft.errors import UsageError
from edgepeft.methods.terms import Method, Trained
from edgepeft.models.shape import ModelShape


class NormConfig(msgspec.Struct, frozen=True, tag="norm", forbid_unknown_fields=True):
    """What decides norm tuning."""

    norms: tuple[str, ...] = ("all",)
    """Which are replaced, by module names or their endings; those that are trained here are all of them."""


class Norm(Method):
    """See the module."""

    paper = "arXiv 2312.11420"
    peft_type = "LN_TUNING"
    adds = "trained gains in place of those of all norms"
    merges = True

    def trained(self, config: NormConfig, shape: ModelShape) -> Trained:
        """The gains of a layer, those over the residual stream one by one; and the last norm's.

        Raises:
            UsageError: not all norms are meant.
        """
        if config.norms != ("all",):
            hint = "Leave norms out; adapters that PEFT trained on some can be used in chat"
            raise UsageError("only all norms can be trained together", where="norms", hint=hint)
        whole, rest = divmod(shape.norm_parameters, shape.hidden)
        of_layer = (*(whole * (shape.hidden,)), *((rest,) if rest else ()))
        return Trained(of_layer, (shape.final_norm_parameters,))

    def trains_gains(self, config: Any) -> bool:
        """All of them."""
        return True
