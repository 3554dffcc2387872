"""AdamW with its moments in 8 bit, by bitsandbytes' kernels (Dettmers et al. 2021, arXiv 2110.02861).

bitsandbytes' own class reads values while it is made, which tensors of a dry run do not have, and waits for the device
after every tensor. This one calls the same operations on states of the same sizes and gives the same numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from edgepeft.engine.model.frozen import bitsandbytes_functional
from edgepeft.memory.optimizer import BLOCK_8BIT, LEAST_8BIT


@functools.cache
def map_values(*, signed: bool) -> tuple[float, ...]:
    """The 256 values of the dynamic 8-bit type, ascending; the second moment has no sign.

    Values are read: ask once before tensors without values come into force.
    """
    return tuple(bitsandbytes_functional().create_dynamic_map(signed=signed).tolist())


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose moments are uint8 in blocks of 256 with a float32 scale each; tensors below 4,096 entries keep
    float32.

    A step changes one tensor after the other, so it cannot be taken back where it ends half-way.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        # Its import registers the operations of a step, which small tensors need too.
        bitsandbytes_functional()
        self._maps: tuple[Tensor, Tensor] | None = None
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @property
    def maps(self) -> tuple[Tensor, ...]:
        """The values of both 8-bit types, float32 [256], once there are 8-bit states."""
        return self._maps or ()

    def create_state(self) -> None:
        """Makes the states of what trains that are missing: moments of zero."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    self._state_of(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step over every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._change(parameter, parameter.grad.contiguous(), group)

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        if found := self.state.get(parameter):
            known: dict[str, Any] = found
            return known
        small = parameter.numel() < LEAST_8BIT
        state: dict[str, Any] = {"step": 0}
        for moment in ("1", "2"):
            dtype = torch.float32 if small else torch.uint8
            state[f"state{moment}"] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)
            if not small:
                blocks = math.ceil(parameter.numel() / BLOCK_8BIT)
                state[f"absmax{moment}"] = torch.zeros(blocks, dtype=torch.float32, device=parameter.device)
        if not small:
            self._maps_on(parameter.device)
        # All of them or none, where memory runs out.
        self.state[parameter] = state
        return state

    def _maps_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._maps is None:
            signed, unsigned = map_values(signed=True), map_values(signed=False)
            self._maps = torch.tensor(signed, device=device), torch.tensor(unsigned, device=device)
        return self._maps

    def _change(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self._state_of(parameter)
        state["step"] += 1
        operations: Any = torch.ops.bitsandbytes
        (beta1, beta2), eps, decay, rate = group["betas"], group["eps"], group["weight_decay"], group["lr"]
        moments = state["state1"], state["state2"]
        # Zeros and None stand for what only other optimizers use; 1 is a factor of the gradient.
        if "absmax1" not in state:
            operations.optimizer_update_32bit(
                "adam", gradient, parameter, *moments, None, 0.0, 0.0, beta1, beta2, 0.0, 0.0, eps, decay,
                state["step"], rate, 1.0, False,
            )  # fmt: skip
            return
        operations.optimizer_update_8bit_blockwise(
            "adam", gradient, parameter, *moments, beta1, beta2, 0.0, 0.0, eps, state["step"], rate,
            *self._maps_on(parameter.device), state["absmax1"], state["absmax2"], decay, 1.0, False,
        )  # fmt: skip
