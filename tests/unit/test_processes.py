"""The environment that workers are started with."""

from __future__ import annotations

import pytest

from edgepeft.processes import worker_environment

_FREED_SLIVERS = """
import ctypes, sys
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.aligned_alloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
libc.aligned_alloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: blocks of a megabyte come from the heap
small = libc.malloc(40)
libc.free(small)
print(libc.malloc(40) == small)
"""


def test_a_card_is_deterministic_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert worker_environment("GPU-1", deterministic=True)["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert "CUBLAS_WORKSPACE_CONFIG" not in worker_environment("GPU-1")
    assert "CUBLAS_WORKSPACE_CONFIG" not in worker_environment("cpu", deterministic=True)


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    environment = worker_environment()
    assert environment["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=1"
    assert environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
