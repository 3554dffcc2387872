"""What training really takes: live tensor bytes on the CPU, the allocator's counters on CUDA, and the process's RSS."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class _Watcher(TorchDispatchMode):
    """Tells every result of every operation to `count`."""

    count: Callable[[Tensor], None]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self.count(value)
        return result


class LiveBytes:
    """Follows every tensor storage of one device from its birth to its death while it is in force.

    Storages that exist when it begins are counted first, so the figures include the base model. Scratch memory inside
    single kernels is invisible to it. Each operation costs some microseconds more.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device.type
        self._known: dict[int, weakref.ref[Any]] = {}
        watcher: Any = _Watcher  # untyped in torch
        self._watcher = watcher()
        self._watcher.count = self._count
        self.live_bytes = 0
        self.peak_bytes = 0

    def __enter__(self) -> LiveBytes:
        self._known.clear()
        self.live_bytes = 0
        for found in gc.get_objects():
            # isinstance() would wake lazy proxies that other libraries keep around.
            if issubclass(type(found), Tensor):
                self._count(found)
                if found.grad_fn is None and found.grad is not None:
                    self._count(found.grad)
        self.peak_bytes = self.live_bytes
        self._watcher.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watcher.__exit__(kind, error, trace)
        # Deaths that come later must not be subtracted from a count that nobody reads.
        self._known.clear()

    def _count(self, tensor: Tensor) -> None:
        if tensor.device.type != self._device or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        known = self._known

        def forget(dead: weakref.ref[Any]) -> None:
            if known.get(key) is dead:
                del known[key]
                self.live_bytes -= size

        known[key] = weakref.ref(storage, forget)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


class MemoryGauge:
    """The highest memory that training took, measured without slowing down micro-batches that cannot raise it.

    On the CPU a micro-batch is watched when it is larger than all that were watched before.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._largest = (0, 0)
        self._largest_evaluated = (0, 0)
        self.live_bytes = 0
        self.peak_bytes = 0

    @property
    def reserved_bytes(self) -> int | None:
        """What the CUDA allocator holds from the driver at most; None on the CPU."""
        return torch.cuda.max_memory_reserved(self._device) if self._device.type == "cuda" else None

    def forget_sizes(self) -> None:
        """Lets micro-batches of every size be watched again; peaks stay."""
        self._largest = (0, 0)
        self._largest_evaluated = (0, 0)

    def wants(self, tokens: int, longest: int) -> bool:
        """Whether a training micro-batch of `tokens`, its longest sample `longest`, is worth watching."""
        return self._device.type != "cpu" or tokens > self._largest[0] or longest > self._largest[1]

    def wants_evaluation(self, tokens: int, longest: int) -> bool:
        """The same for a micro-batch of an evaluation; remembers that it was watched."""
        before = self._largest_evaluated
        self._largest_evaluated = (max(before[0], tokens), max(before[1], longest))
        return self._device.type != "cpu" or self._largest_evaluated != before

    @contextmanager
    def watch(self, tokens: int = 0, longest: int = 0) -> Iterator[None]:
        """Measures what happens inside.

        Args:
            tokens: of the micro-batch.
            longest: its longest sample.
        """
        if self._device.type == "cuda":
            yield
            self.live_bytes = torch.cuda.memory_allocated(self._device)
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(self._device))
            return
        counter = LiveBytes(self._device)
        try:
            with counter:
                yield
            self._largest = (max(self._largest[0], tokens), max(self._largest[1], longest))
        finally:
            self.live_bytes = counter.live_bytes
            self.peak_bytes = max(self.peak_bytes, counter.peak_bytes)


def resident_bytes() -> int | None:
    """Anonymous and shared resident bytes of this process; files that are only mapped do not count.

    None where the system does not tell.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = 0
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name in ("RssAnon", "RssShmem"):
                found += int(value.split()[0]) * 1024
        return found or None
    import psutil

    return int(psutil.Process().memory_info().rss)
