"""The part of accelerate's `Accelerator` that an update uses, without its global state."""

from __future__ import annotations

from typing import Any

import torch


class _Scaled:
    """What accelerate's optimizer does, without its global state."""

    def __init__(self, adamw: torch.optim.AdamW, scaler: Any) -> None:
        self._adamw, self._scaler = adamw, scaler

    def step(self) -> None:
        if self._scaler is None:
            self._adamw.step()
            return
        self._scaler.step(self._adamw)
        self._scaler.update()


class Accelerator:
    """Prepares an optimizer, and scales losses where it is asked to."""

    def __init__(self, *, scaled: bool = False) -> None:
        self.scaler: Any = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None
        self._adamw: Any = None

    def prepare_optimizer(self, adamw: torch.optim.AdamW) -> _Scaled:
        self._adamw = adamw
        return _Scaled(adamw, self.scaler)

    def unscale_gradients(self, optimizer: object) -> None:
        if self.scaler is not None:
            self.scaler.unscale_(self._adamw)

    def backward(self, loss: torch.Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
