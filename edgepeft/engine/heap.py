"""The C library's heap, which holds the tensors of a CPU."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any


def trim_heap() -> None:
    """Has the C library return what is free in its heap, holes between blocks that stay included.

    Otherwise a hole that the next tensor does not fit into stays resident: a process that loaded in NF4 holds twice the
    model's bytes, and one that trains on micro-batches of ever other lengths some tens of megabytes beside its tensors.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Any:
    """glibc's malloc_trim; None where the C library has none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
