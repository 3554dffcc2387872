"""Operations whose fake versions refuse what the real ones do; entered inside a `FakeTensorMode`."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_GROUPED = torch.ops.aten._grouped_mm.default


class _FakeOperations(TorchDispatchMode):
    """Grouped products of experts in float32: torch 2.13 computes them on the CPU, its fake version wants bf16."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _GROUPED and args[0].dtype != torch.bfloat16 and args[0].dim() == 2 and args[1].dim() == 3:
            # Rows [n, in] with matrices [experts, in, out].
            return args[0].new_empty((args[0].shape[0], args[1].shape[2]))
        return func(*args, **(kwargs or {}))


def fake_operations() -> Any:
    """The mode, as a context manager."""
    mode: Any = _FakeOperations  # untyped in torch
    return mode()
