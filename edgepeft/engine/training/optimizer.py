"""The optimizer: AdamW in its forms, the learning rate of each step, and what happens when numbers are not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import increment_version

from edgepeft.engine.training.adamw8bit import AdamW8bit
from edgepeft.engine.training.divergence import Diverged
from edgepeft.spec import Optimizer, Schedule

PATIENCE_STEPS = 5
"""Steps with numbers that are not finite, one after the other, until a run gives up."""


def make_optimizer(parameters: Mapping[str, nn.Parameter], settings: Optimizer) -> torch.optim.AdamW | AdamW8bit:
    """AdamW (arXiv 1711.05101) over float32 adapter parameters by name: one fused kernel a step, or 8-bit states."""
    groups = _groups(parameters, settings)
    betas = settings.beta1, settings.beta2
    rate, epsilon, decay = settings.learning_rate, settings.epsilon, settings.weight_decay
    kind: Any = AdamW8bit if settings.name == "adamw8bit" else partial(torch.optim.AdamW, fused=True)
    optimizer: torch.optim.AdamW | AdamW8bit = kind(groups, lr=rate, betas=betas, eps=epsilon, weight_decay=decay)
    optimizer.register_step_post_hook(_count_change)
    return optimizer


def _count_change(optimizer: torch.optim.Optimizer, *_: object) -> None:
    # torch's fused step does not count as a change; what is formed from parameters goes by their count of changes.
    increment_version([value for group in optimizer.param_groups for value in group["params"]])


def set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The rate of the next step; LoRA's B gets its multiple of it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["ratio"]


def _groups(parameters: Mapping[str, nn.Parameter], settings: Optimizer) -> list[dict[str, Any]]:
    """All parameters at one rate, or LoRA's B at a multiple of it (LoRA+, arXiv 2402.12354), chosen as PEFT does; an
    embedding's LoRA, for which PEFT has a third rate, is not among them."""
    ratio = settings.lora_plus_ratio
    fast = [name for name, value in parameters.items() if "lora_B" in name or value.dim() == 1]
    if ratio == 1 or not fast:
        return [{"params": list(parameters.values()), "ratio": 1.0}]
    rate = settings.learning_rate
    groups = [
        {"params": [value for name, value in parameters.items() if name not in fast], "lr": rate, "ratio": 1.0},
        {"params": [parameters[name] for name in fast], "lr": rate * ratio, "ratio": ratio},
    ]
    return [group for group in groups if group["params"]]


def learning_rate_at(step: int, steps: int, settings: Optimizer, schedule: Schedule) -> float:
    """The rate of optimizer step `step`, counted from 0, of `steps`; a pure function, so resuming needs no state.

    Linear warm-up reaches the peak at its last step; the decay reaches `final_fraction` when all steps are done.
    """
    peak = settings.learning_rate
    warmup = min(steps - 1, math.ceil(schedule.warmup_fraction * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    if schedule.name == "constant":
        return peak
    share = 1 - progress if schedule.name == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * share)


class FiniteWatch:
    """Counts steps whose loss or gradient was not finite; such a step is skipped, several in a row end the run."""

    def __init__(self) -> None:
        self.in_a_row = 0

    def accepts(self, loss: float, grad_norm: float, loss_scale: float = 1.0) -> bool:
        """Whether the step may change the parameters.

        Args:
            loss: of the step.
            grad_norm: of its gradients, the scale taken out.
            loss_scale: what an fp16 scaler multiplied the loss with. It begins high on purpose and is halved by each
                overflow, so a gradient that overflowed above 1 says nothing about the run.

        Raises:
            Diverged: it is the fifth bad one in a row.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = 0
            return True
        if math.isfinite(loss) and loss_scale > 1:
            return False
        self.in_a_row += 1
        if self.in_a_row >= PATIENCE_STEPS:
            what = "loss" if not math.isfinite(loss) else "gradient"
            raise Diverged(
                f"the {what} was not finite in {self.in_a_row} steps in a row, so training has diverged",
                hint="Use a smaller learning rate, or compute in bf16 or fp32 instead of fp16",
            )
        return False
