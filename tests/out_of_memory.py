"""Memory that runs out on purpose: at a chosen micro-batch, or at a chosen allocation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from edgepeft.engine.training import step as step_module
from edgepeft.engine.training.loss import summed_loss
from edgepeft.runs.events import Event, PhaseChanged


def allocator_error() -> Exception:
    """What torch raises when the C library has no memory left."""
    return RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory")


def fail_at(monkeypatch: pytest.MonkeyPatch, calls: set[int], error: Callable[[], Exception] = allocator_error) -> None:
    """Lets the loss of these micro-batches, counted from 0, run out of memory; those of the probe count too."""
    count = -1

    def failing(*arguments: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count in calls:
            raise error()
        return summed_loss(*arguments)

    monkeypatch.setattr(step_module, "summed_loss", failing)


class Allocations(TorchDispatchMode):
    """Counts new storages of at least `least_bytes`, and lets number `at`, from 0, fail."""

    def __init__(self, at: int = -1, least_bytes: int = 512) -> None:
        super().__init__()
        self.at = at
        self.least_bytes = least_bytes
        self.count = 0
        self.failed = False
        self._entered = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {_key(value) for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)}
        for value in tree_iter(result):
            if isinstance(value, Tensor) and value.untyped_storage().nbytes() >= self.least_bytes:
                if _key(value) in known:
                    continue
                known.add(_key(value))
                self.count += 1
                if self.count - 1 == self.at:
                    self.failed = True
                    raise allocator_error()
        return result

    def while_in(self, beginning: str, until: str = "save") -> Callable[[Event], None]:
        """A hook for events that brings it into force at one phase, by its detail or name, and ends it at another."""

        def hook(event: Event) -> None:
            if isinstance(event, PhaseChanged):
                if not self._entered and event.detail.startswith(beginning):
                    self._entered = True
                    self.__enter__()
                elif self._entered and until in (event.name, event.detail):
                    self.stop()

        return hook

    def stop(self) -> None:
        """Ends it; a second call does nothing."""
        if self._entered:
            self._entered = False
            self.__exit__(None, None, None)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
