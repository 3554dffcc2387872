"""The live ledger: every tensor storage of a device from its birth to its death, by category.

A category is what the engine is doing when a storage is born (`counting_as`), unless the engine says otherwise
(`LiveBytes.assign`): gradients are born in a backward and stay, the model was there before. The same ledger follows
real tensors and, in a dry run, fake ones.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from edgepeft.memory.breakdown import Category

# Plain globals: backward on CUDA runs in another thread, which sees neither thread-locals nor context variables.
_category: Category = "workspace"
_place = ""
_in_force: list[LiveBytes] = []
_DEVICE_OF = torch.ops.prim.device.default
_PASSING = -1
"""The key of what comes and goes inside an operation."""


@contextmanager
def counting_as(category: Category, place: str | None = None) -> Iterator[None]:
    """Storages born inside the block belong to `category`; `place` says where that is, None keeps the place."""
    global _category, _place
    before = _category, _place
    _category = category
    if place is not None:
        _place = place
    try:
        yield
    finally:
        _category, _place = before


def mark_place(place: str) -> None:
    """Says where the work has got to, until the enclosing `counting_as` ends."""
    global _place
    _place = place


def assign(tensors: Iterable[Tensor], category: Category) -> None:
    """Says in every ledger in force that these storages belong to `category` from now on."""
    for ledger in _in_force:
        for tensor in tensors:
            ledger.assign(tensor, category)


def lie_in_files(tensors: Iterable[Tensor]) -> None:
    """Says in every ledger in force that these storages are files mapped into memory: they count nothing."""
    for ledger in _in_force:
        for tensor in tensors:
            ledger.count_nothing(tensor)


def current_place() -> str:
    """Where the work has got to."""
    return _place


class BudgetExceeded(MemoryError):
    """More live bytes than the run may hold; handled like any other lack of memory."""


class Trace(Protocol):
    """What wants to hear of births and deaths, such as a model of an allocator."""

    def born(self, key: int, size_bytes: int) -> None:
        """A storage was allocated; `key` is its own until it dies."""
        ...

    def died(self, key: int) -> None:
        """The storage of that key was freed."""
        ...


Scratch = Callable[[Any, tuple[Any, ...], dict[str, Any]], int]
"""Tells how many bytes an operation (torch's overload, its arguments and options) needs inside, beside its results."""


class _Watcher(TorchDispatchMode):
    """Tells every result of every operation to `count`, and what it needed inside to `pass_by`."""

    count: Callable[[Tensor], None]
    pass_by: Callable[[int], None]
    scratch: Scratch | None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE_OF and isinstance(args[0], FakeTensor):
            # Asked before nearly every operation on a fake tensor.
            return args[0].device
        options = kwargs or {}
        result = func(*args, **options)
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self.count(value)
        if self.scratch is not None and (size_bytes := self.scratch(func, args, options)):
            self.pass_by(size_bytes)
        return result


class LiveBytes:
    """Follows every tensor storage of one device while it is in force.

    Storages that exist when it begins are counted first, so the figures include the base model. Scratch memory inside
    single kernels is invisible to it, unless `scratch` knows it. Each operation costs some microseconds more.

    Args:
        device: whose storages count.
        known: tensors that exist already, and what they are; other existing ones count as workspace.
        mapped: tensors that lie in files; they count nothing.
        others: look for other existing tensors; without, they count nothing.
        limit_bytes: raise `BudgetExceeded` where live bytes pass it.
        trace: hears of every birth and death.
        scratch: knows what operations need inside.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        known: Mapping[Category, list[Tensor]] | None = None,
        mapped: Iterable[Tensor] = (),
        others: bool = True,
        limit_bytes: int | None = None,
        trace: Trace | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        self._device = device.type
        self._given = known or {}
        self._mapped = list(mapped)
        self._look_for_others = others
        self._limit_bytes = limit_bytes
        self._trace = trace
        self._known: dict[int, _Storage] = {}
        watcher: Any = _Watcher  # untyped in torch
        self._watcher = watcher()
        self._watcher.count = self._count
        self._watcher.pass_by = self._pass_by
        self._watcher.scratch = scratch
        self.live_bytes = 0
        self.peak_bytes = 0
        self.by_category: dict[Category, int] = {}
        """Live now."""
        self.peak_by_category: dict[Category, int] = {}
        """Live at the highest point."""
        self.peak_place = ""
        """Where the highest point was."""
        self.peaks_by_place: dict[str, dict[Category, int]] = {}
        """The highest point of each place."""
        self._totals_by_place: dict[str, int] = {}

    def __enter__(self) -> LiveBytes:
        self._known.clear()
        self.live_bytes = 0
        self.by_category = {}
        limit, self._limit_bytes = self._limit_bytes, None
        with counting_as("workspace"):
            for category, tensors in self._given.items():
                for tensor in tensors:
                    self._count(tensor, category)
            for tensor in self._mapped:
                self._count(tensor, size_bytes=0)
            for found in gc.get_objects() if self._look_for_others else ():
                # isinstance() would wake lazy proxies that other libraries keep; what a dry run left is no memory.
                if issubclass(type(found), Tensor) and not issubclass(type(found), FakeTensor):
                    self._count(found)
                    if found.grad_fn is None and found.grad is not None:
                        self._count(found.grad, "gradients")
        self._limit_bytes = limit
        # Held any longer, gradients would outlive their step.
        self._given, self._mapped = {}, []
        self.restart_peaks()
        self._watcher.__enter__()
        _in_force.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _in_force.remove(self)
        self._watcher.__exit__(kind, error, trace)
        # Deaths that come later must not be subtracted from a count that nobody reads.
        self._known.clear()

    def restart_peaks(self) -> None:
        """Forgets the highest points so far: what lives now is the first of a new phase."""
        self.peak_bytes, self.peak_by_category, self.peak_place = self.live_bytes, dict(self.by_category), _place
        self.peaks_by_place, self._totals_by_place = {_place: dict(self.by_category)}, {_place: self.live_bytes}

    def assign(self, tensor: Tensor, category: Category) -> None:
        """Says that a storage belongs to `category` from now on."""
        storage = self._known.get(tensor.untyped_storage()._cdata)
        if storage is not None and storage.category != category:
            self.by_category[storage.category] -= storage.size_bytes
            self.by_category[category] = self.by_category.get(category, 0) + storage.size_bytes
            storage.category = category

    def count_nothing(self, tensor: Tensor) -> None:
        """Says that a storage that was not seen so far takes no memory."""
        self._count(tensor, size_bytes=0)

    def _count(self, tensor: Tensor, category: Category | None = None, size_bytes: int | None = None) -> None:
        if tensor.device.type != self._device or tensor.layout != torch.strided:
            return
        untyped = tensor.untyped_storage()
        key = untyped._cdata
        if key in self._known:
            return
        size = untyped.nbytes() if size_bytes is None else size_bytes
        known = self._known
        storage = _Storage(category or _category, size)

        def forget(dead: Any) -> None:
            if known.get(key) is storage:
                del known[key]
                self.live_bytes -= size
                self.by_category[storage.category] -= size
                if self._trace is not None:
                    self._trace.died(key)

        storage.reference = weakref.ref(untyped, forget)
        known[key] = storage
        self.live_bytes += size
        self.by_category[storage.category] = self.by_category.get(storage.category, 0) + size
        if self._trace is not None:
            self._trace.born(key, size)
        self._look()

    def _pass_by(self, size_bytes: int) -> None:
        """Bytes of the present category that came and went inside one operation."""
        self.live_bytes += size_bytes
        self.by_category[_category] = self.by_category.get(_category, 0) + size_bytes
        if self._trace is not None:
            self._trace.born(_PASSING, size_bytes)
            self._trace.died(_PASSING)
        try:
            self._look()
        finally:
            self.live_bytes -= size_bytes
            self.by_category[_category] -= size_bytes

    def _look(self) -> None:
        """Remembers what lives now if it is the most so far; what exceeds the limit is refused, and no peak."""
        if self._limit_bytes is not None and self.live_bytes > self._limit_bytes:
            raise BudgetExceeded(f"{self.live_bytes:,} live bytes are more than the budget of {self._limit_bytes:,}")
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_by_category, self.peak_place = self.live_bytes, dict(self.by_category), _place
        if self.live_bytes > self._totals_by_place.get(_place, -1):
            self._totals_by_place[_place] = self.live_bytes
            self.peaks_by_place[_place] = dict(self.by_category)


class _Storage:
    """One living storage."""

    __slots__ = ("category", "reference", "size_bytes")

    def __init__(self, category: Category, size_bytes: int) -> None:
        self.category = category
        self.size_bytes = size_bytes
        self.reference: Any = None
