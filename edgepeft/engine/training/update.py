"""The second half of a step: gradients become a change of the adapter, exactly once."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from edgepeft.engine.training.adamw8bit import AdamW8bit
from edgepeft.engine.training.checkpoints import optimizer_tensors, restore_optimizer
from edgepeft.engine.training.optimizer import make_optimizer, set_rate
from edgepeft.engine.training.recovery import first_line, is_out_of_memory
from edgepeft.errors import OutOfMemory
from edgepeft.memory.breakdown import Category
from edgepeft.spec import Optimizer


class AdapterUpdate:
    """Gradients and AdamW's state of one adapter, clipping, and in fp16 the scale of the loss.

    Args:
        parameters: of the adapter, by name; float32.
        settings: of the optimizer.
        accelerator: owns the gradient scaler, when there is one.
        places: of the adapter, which do not change.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        settings: Optimizer,
        accelerator: Accelerator,
        places: Collection[Tensor] = (),
    ) -> None:
        self.parameters = dict(parameters)
        self._places = places
        self._max_norm = settings.max_grad_norm
        self._accelerator = accelerator
        self._adamw = make_optimizer(self.parameters, settings)
        self._adamw.register_step_post_hook(self._remember_applied)
        self._optimizer = accelerator.prepare_optimizer(self._adamw)
        self._applied = False

    def create_state(self) -> None:
        """Makes the states that AdamW would make in its next step, with the same values: those of all that trains now.

        No step can then fail on them half-way.
        """
        if isinstance(self._adamw, AdamW8bit):
            self._adamw.create_state()
            return
        for parameter in self._training():
            if not self._adamw.state.get(parameter):
                # All of them or none, where memory runs out.
                self._adamw.state[parameter] = {
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                }

    def drop_idle_state(self) -> None:
        """Frees the states of what does not train yet."""
        for parameter in self.parameters.values():
            if not parameter.requires_grad:
                self._adamw.state.pop(parameter, None)

    def create_gradients(self) -> None:
        """Makes gradients of zero, as they exist from a step's second micro-batch on."""
        for parameter in self._training():
            parameter.grad = torch.zeros_like(parameter)

    def drop_gradients(self) -> None:
        """Frees all gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss`, scaled where there is a scaler."""
        self._accelerator.backward(loss)

    def set_rate(self, learning_rate: float) -> None:
        """The learning rate of the next `apply`."""
        set_rate(self._adamw, learning_rate)

    def clip(self) -> float:
        """Scales the gradients down to the recipe's norm; returns the norm before, 0 where there are none."""
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        if not gradients:
            return 0.0
        self._accelerator.unscale_gradients(self._optimizer)
        found = float(torch.nn.utils.get_total_norm(gradients, foreach=True))
        if self._max_norm > 0 and math.isfinite(found) and found > self._max_norm:
            torch._foreach_mul_(gradients, self._max_norm / (found + 1e-6))
        return found

    def apply(self) -> None:
        """One step of AdamW; a scaler skips it where a gradient overflowed, and moves its scale.

        Raises:
            RuntimeError, MemoryError: memory ran out; parameters and states are as before, gradients are not.
            OutOfMemory: it ran out in a step that changes one part after the other, which cannot be taken back.
        """
        whole = isinstance(self._adamw, torch.optim.AdamW) and len(self._adamw.param_groups) == 1
        counts = [state["step"] for state in self._adamw.state.values() if state] if whole else []
        before = torch.stack(counts) if counts else None
        self._applied = False
        try:
            self._optimizer.step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if self._applied:
                # What failed came after it: the scale stays where it is for one more step.
                self._forget_unscaled()
                return
            if not whole:
                raise OutOfMemory(
                    f"memory ran out in the middle of the optimizer's step ({first_line(error)})",
                    hint="Resume the run when more memory is free: it goes on from its last checkpoint",
                ) from None
            # AdamW counts first, then changes everything in one operation that allocates nothing.
            if before is not None:
                for count, value in zip(counts, before.unbind(), strict=True):
                    count.copy_(value)
            raise

    def start_anew(self) -> None:
        """Forgets an attempt at a step that ran out of memory."""
        self.drop_gradients()
        self._forget_unscaled()

    def tensors_by_category(self) -> dict[Category, list[Tensor]]:
        """Everything that it holds now."""
        gradients = [parameter.grad for parameter in self.parameters.values()]
        return {
            "adapter weights": [*self.parameters.values(), *self._places],
            "gradients": [gradient for gradient in gradients if gradient is not None],
            "optimizer state": self._states(),
        }

    def _training(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters.values() if parameter.requires_grad]

    def _states(self) -> list[Tensor]:
        states = [value for state in self._adamw.state.values() for value in state.values()]
        shared = self._adamw.maps if isinstance(self._adamw, AdamW8bit) else ()
        return [*(value for value in states if isinstance(value, Tensor)), *shared]

    def tensors(self) -> dict[str, Tensor]:
        """AdamW's states as `PARAMETER/STATE` → tensor, sharing their memory."""
        return optimizer_tensors(self._adamw, self.parameters)

    def restore(self, tensors: Mapping[str, Tensor], scaler: Mapping[str, Any]) -> None:
        """Puts back what `tensors` and `scaler_state` gave."""
        restore_optimizer(self._adamw, self.parameters, tensors)
        if self._scaler is not None and scaler:
            self._scaler.load_state_dict(dict(scaler))

    @property
    def scaler_state(self) -> dict[str, Any] | None:
        """The fp16 scaler's state; None where there is none."""
        return self._scaler.state_dict() if self._scaler is not None else None

    @property
    def scaled(self) -> bool:
        """Whether losses are scaled."""
        return self._scaler is not None

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied with."""
        return float(self._scaler.get_scale()) if self._scaler is not None else 1.0

    @property
    def _scaler(self) -> Any:
        return self._accelerator.scaler

    def _remember_applied(self, *_: object) -> None:
        self._applied = True

    def _forget_unscaled(self) -> None:
        if self._scaler is not None:
            # A scaler refuses to unscale twice before `update`, which would move the scale.
            self._scaler._per_optimizer_states.clear()
